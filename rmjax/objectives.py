"""Objectives: what is minimised, as values.

An objective is a weighted sum of terms. Each term is a mean over the batch: its loss is a sum,
which the step divides by the term's weight in the whole batch, over all micro-batches and devices.
So the loss and its gradient are the same however the batch is packed, accumulated or sharded.

Formulas and sources are in docs/objectives.md.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rmjax.errors import UserError
from rmjax.general import NAME as GENERAL
from rmjax.general import GeneralPreference
from rmjax.ordinal import levels, negative_log_likelihood
from rmjax.parameters import THRESHOLDS, Params
from rmjax.rows import Pairs, Targets

Scores = Float32[Array, "... S A"]
Rewards = Float32[Array, "... P"]

TIES = ("drop", "half", "zero_weight")


@dataclasses.dataclass
class PreferenceConfig:
    """How preference pairs are learned from; regression takes no notice of it.

    Attributes:
      attribute: the column of the head that pairs train; empty for the first. It may be one that
        nobody rated.
      label_smoothing: the probability that a pair's label is wrong, less than .5.
      centring: coefficient of the mean of (reward of chosen + reward of rejected) squared, which
        keeps rewards near 0; 0 for none.
      ties: what becomes of pairs without a preference: `drop` leaves them out of the data, `half`
        takes them as preferred one half each way, `zero_weight` computes them but learns nothing
        from them.
    """

    attribute: str = ""
    label_smoothing: float = 0.0
    centring: float = 0.0
    ties: str = "drop"


class Term(NamedTuple):
    """`loss(scores, targets, params)` sums over a batch; `weight(targets)` is what divides that.

    The parameters are the model's, for terms that have some of their own.
    """

    loss: Callable[[Scores, Targets, Params], Float32[Array, ""]]
    weight: Callable[[Targets], Float32[Array, ""]]


class Objective(NamedTuple):
    """A weighted sum of terms.

    Attributes:
      terms: each with its coefficient.
      ratings: whether it needs rated samples.
      pairs: whether it needs pairs.
      strengths: whether it needs to know how much better a pair's preferred sample is.
      column: of the head, that pairs train.
      levels: lowest and highest of the ratings, where they are ordinal; else None.
      general: how it compares responses, where that is not by one number each; else None.
    """

    terms: tuple[tuple[float, Term], ...]
    ratings: bool
    pairs: bool
    strengths: bool
    column: int
    levels: tuple[int, int] | None = None
    general: GeneralPreference | None = None

    @property
    def thresholds(self) -> int:
        """How many thresholds of its own it has for an attribute."""
        return self.levels[1] - self.levels[0] if self.levels else 0

    def weights(self, targets: Targets) -> Float32[Array, "T"]:
        """What each term's sum over `targets` is divided by, at least 1."""
        found = [term.weight(targets) for _, term in self.terms]
        return jnp.maximum(jnp.stack(found), 1.0)

    def loss(
        self,
        scores: Scores,
        targets: Targets,
        weights: Float32[Array, "T"],
        params: Params | None = None,
    ) -> Float32[Array, ""]:
        """The share of `targets` in the loss of the batch whose `weights` are given.

        `params` are the model's, of which the objective needs its own, if it has any.
        """
        terms = [
            coefficient * term.loss(scores, targets, params or {}) / weight
            for (coefficient, term), weight in zip(self.terms, weights)
        ]
        return jnp.sum(jnp.stack(terms))


# ---- ratings ------------------------------------------------------------------------------------


def _squared_error(scores: Scores, targets: Targets, params: Params) -> jax.Array:
    # Empty slots hold arbitrary scores: select before squaring, so that no infinity times zero
    # can reach the sum or the gradient.
    labels, weights = targets.ratings
    error = jnp.where(weights > 0, scores - labels, 0.0)
    return jnp.sum(weights * jnp.square(error))


def _ordinal(lowest: int) -> Callable[[Scores, Targets, Params], jax.Array]:
    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        labels, weights = targets.ratings
        present = weights > 0
        numbers, level = (jnp.where(present, x, 0.0) for x in (scores, labels - lowest))
        found = negative_log_likelihood(numbers, level, params[THRESHOLDS.path])
        return jnp.sum(weights * found)

    return loss


def _sum_of_ratings(targets: Targets) -> jax.Array:
    return jnp.sum(targets.ratings.weights)


# ---- pairs --------------------------------------------------------------------------------------


def _rewards(scores: Scores, pairs: Pairs, column: int) -> tuple[Rewards, Rewards]:
    """Of the chosen and of the rejected; 0 where there is no pair, whose slots hold anything."""
    reward = scores[..., column]
    found = [jnp.take_along_axis(reward, s, axis=-1) for s in (pairs.chosen, pairs.rejected)]
    chosen, rejected = (jnp.where(pairs.weights > 0, r, 0.0) for r in found)
    return chosen, rejected


def _pair_weights(pairs: Pairs, config: PreferenceConfig) -> Rewards:
    learned = pairs.strengths > 0 if config.ties == "zero_weight" else True
    return jnp.where(learned, pairs.weights, 0.0)


def _cross_entropy(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin), p = 1 - smoothing, 1/2 in a tie."""
    p = jnp.where(pairs.strengths > 0, 1 - config.label_smoothing, 0.5)
    return p * jax.nn.softplus(-margins) + (1 - p) * jax.nn.softplus(margins)


def _margin_bradley_terry(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    assert margins.shape == pairs.strengths.shape  # a margin for each pair, none for all pairs
    return _cross_entropy(margins - pairs.strengths, pairs, config)


def _scaled_bradley_terry(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    assert margins.shape == pairs.strengths.shape
    return pairs.strengths * _cross_entropy(margins, pairs, config)


_OF_MARGINS = {
    "bradley_terry": _cross_entropy,
    "margin_bradley_terry": _margin_bradley_terry,
    "scaled_bradley_terry": _scaled_bradley_terry,
}
_NEED_STRENGTHS = ("margin_bradley_terry", "scaled_bradley_terry")
_OF_RATINGS = ("regression", "ordinal")
OBJECTIVES = (*_OF_RATINGS, *_OF_MARGINS, GENERAL)


def _pair_term(name: str, column: int, config: PreferenceConfig) -> Term:
    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        pairs = targets.pairs
        chosen, rejected = _rewards(scores, pairs, column)
        found = _OF_MARGINS[name](chosen - rejected, pairs, config)
        if config.centring:
            found += config.centring * jnp.square(chosen + rejected)
        return jnp.sum(_pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(_pair_weights(targets.pairs, config)))


def _general_term(general: GeneralPreference, config: PreferenceConfig) -> Term:
    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        pairs = targets.pairs
        there = pairs.weights[..., None] > 0
        chosen, rejected = (
            jnp.where(there, jnp.take_along_axis(scores, slots[..., None], axis=-2), 0.0)
            for slots in (pairs.chosen, pairs.rejected)
        )
        found = _cross_entropy(general.margins(chosen, rejected), pairs, config)
        return jnp.sum(_pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(_pair_weights(targets.pairs, config)))


# ---- by name ------------------------------------------------------------------------------------


def parse_objective(text: str) -> dict[str, float]:
    """Coefficients by name: `"regression + 0.5 * bradley_terry"` has 1 and 0.5.

    Raises:
      UserError: naming what is not understood.
    """
    found: dict[str, float] = {}
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(?:([0-9.eE-]+)\s*\*\s*)?(\w+)\s*", part)
        try:
            coefficient = float(match[1] or 1) if match else math.nan
        except ValueError:
            coefficient = math.nan
        if not match or not 0 < coefficient < math.inf or match[2] in found:
            raise UserError(
                f"config.objective = {text!r}: expected names, each once, with positive "
                "coefficients, such as 'regression + 0.5 * bradley_terry'"
            )
        if match[2] not in OBJECTIVES:
            raise UserError(
                f"config.objective = {text!r}: there are {', '.join(OBJECTIVES)}, and sums of them"
            )
        found[match[2]] = coefficient
    if all(name in found for name in _OF_RATINGS):
        raise UserError(
            f"config.objective = {text!r}: a number of the head is a rating or lies among "
            "thresholds, not both: choose one of " + ", ".join(_OF_RATINGS)
        )
    return found


def make_objective(
    text: str,
    attributes: tuple[str, ...],
    config: PreferenceConfig,
    label_range: tuple[float, float] = (0.0, 4.0),
) -> Objective:
    """The objective that a config names.

    Args:
      text: see `parse_objective`.
      attributes: of the head's columns.
      config: of the terms that learn from pairs.
      label_range: lowest and highest rating.

    Raises:
      UserError: it does not fit the attributes or the range.
    """
    column = pair_column(attributes, config)
    coefficients = parse_objective(text)
    general = GeneralPreference() if GENERAL in coefficients else None
    if general:
        _check_general(coefficients, attributes, config)
    found = levels(label_range) if "ordinal" in coefficients else None

    def term(name: str) -> Term:
        if name == "regression":
            return Term(_squared_error, _sum_of_ratings)
        if found and name == "ordinal":
            return Term(_ordinal(found[0]), _sum_of_ratings)
        if general:
            return _general_term(general, config)
        return _pair_term(name, column, config)

    pairs = [name for name in coefficients if name not in _OF_RATINGS]
    return Objective(
        terms=tuple((coefficient, term(name)) for name, coefficient in coefficients.items()),
        ratings=len(pairs) < len(coefficients),
        pairs=bool(pairs),
        strengths=any(name in _NEED_STRENGTHS for name in pairs),
        column=column,
        levels=found,
        general=general,
    )


def _check_general(
    coefficients: dict[str, float], attributes: tuple[str, ...], config: PreferenceConfig
) -> None:
    """Raises a `UserError` unless the whole head can be the vector that is compared."""
    if len(coefficients) > 1:
        raise UserError(
            f"config.objective: {GENERAL!r} takes all numbers of the head as one vector, so it "
            "cannot be summed with others"
        )
    if not attributes or len(attributes) % 2:
        raise UserError(
            f"config.data.attributes = {attributes!r}: {GENERAL!r} needs an even number of them, "
            "such as ('v1', 'v2', 'v3', 'v4'); their names are yours to choose"
        )
    if config.attribute or config.centring:
        raise UserError(
            f"config.preference.attribute = {config.attribute!r} and centring = {config.centring}: "
            f"{GENERAL!r} has neither a column of its own nor rewards to centre; leave both out"
        )


def pair_column(attributes: tuple[str, ...], config: PreferenceConfig) -> int:
    """The column of the head that pairs train."""
    if not config.attribute:
        return 0
    if config.attribute not in attributes:
        raise UserError(
            f"config.preference.attribute = {config.attribute!r}: config.data.attributes has "
            + ", ".join(attributes)
        )
    return attributes.index(config.attribute)
