"""Objectives: what is minimised, as values.

An objective is a weighted sum of terms. Each term is a mean over the batch: its loss is a sum,
which the step divides by the term's weight in the whole batch, over all micro-batches and devices.
So the loss and its gradient are the same however the batch is packed, accumulated or sharded.

Formulas and sources are in docs/objectives.md.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from rmjax.config import AlignConfig, Config, PolicyGradientConfig, PreferenceConfig
from rmjax.data.batch import PolicyTargets, Rollouts, Targets
from rmjax.errors import UserError
from rmjax.models.parameters import THRESHOLDS, Parameter, Params, abstract_params
from rmjax.models.rewards.general_preference import NAME as GENERAL
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.models.rewards.ordinal import levels
from rmjax.models.rewards.spec import RewardSpec
from rmjax.runtime.sharding import Sharding
from rmjax.training.objectives.base import Scores, Term
from rmjax.training.objectives.pairs import OF_MARGINS, general_term, pair_column, pair_term
from rmjax.training.objectives.policies import (
    OF_POLICY_PAIRS,
    WITHOUT_REFERENCE,
    imitated_tokens,
    negative_log_likelihood,
    policy_pair_term,
)
from rmjax.training.objectives.ratings import ordinal, squared_error, sum_of_ratings
from rmjax.training.objectives.rollouts import (
    METHODS,
    chosen_method,
    policy_gradient,
    value_error,
)


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
      policy: whether it is a policy's: scores are then log-probabilities of responses.
      beta: of a policy's pairs, how closely they hold it to the reference; 0 without them.
      reference: whether it needs a reference policy's log-probability of each response.
    """

    terms: tuple[tuple[float, Term], ...]
    ratings: bool
    pairs: bool
    strengths: bool
    column: int
    levels: tuple[int, int] | None = None
    general: GeneralPreference | None = None
    policy: bool = False
    beta: float = 0.0
    reference: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The rows of the table that it brings, beside the model's."""
        return (THRESHOLDS,) if self.levels else ()

    def abstract(self, sizes: dict[str, int], sharding: Sharding) -> Params:
        """Shapes, dtypes and shardings of these; `sizes` are of the model's axes."""
        count = {"threshold": self.levels[1] - self.levels[0]} if self.levels else {}
        return abstract_params(self.parameters, sizes | count, sharding)

    def first_params(self, abstract: Params, spec: RewardSpec | None) -> Params:
        """Their values before the first step: zeros, or those of the model that is continued.

        Args:
          abstract: see `abstract`.
          spec: of that model, if there is one. Its thresholds are taken if there are as many.
        """
        scale = spec.ordinal if spec else None

        def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            raw = scale.raw(spec.attributes) if spec and scale else None
            fits = raw is not None and raw.shape == leaf.shape
            return jax.device_put(raw if fits else np.zeros(leaf.shape, np.float32), leaf.sharding)

        return jax.tree.map(value, abstract)

    def weights(self, targets: Targets | PolicyTargets | Rollouts) -> Float32[Array, "T"]:
        """What each term's sum over `targets` is divided by, at least 1."""
        found = [term.weight(targets) for _, term in self.terms]
        return jnp.maximum(jnp.stack(found), 1.0)

    def loss(
        self,
        scores: Scores,
        targets: Targets | PolicyTargets | Rollouts,
        weights: Float32[Array, "T"],
        params: Params | None = None,
    ) -> Float32[Array, ""]:
        """The share of `targets` in the loss of the batch whose `weights` are given.

        Of `params` it reads its own, if it has any.
        """
        terms = [
            coefficient * term.loss(scores, targets, params or {}) / weight
            for (coefficient, term), weight in zip(self.terms, weights)
        ]
        return jnp.sum(jnp.stack(terms))


_NEED_STRENGTHS = (
    *("margin_bradley_terry", "scaled_bradley_terry", "margin_dpo", "scaled_dpo"),
    *("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"),
)
_OF_RATINGS = ("regression", "ordinal")
OBJECTIVES = (*_OF_RATINGS, *OF_MARGINS, GENERAL)
POLICY_OBJECTIVES = ("sft", *OF_POLICY_PAIRS)
ROLLOUT_OBJECTIVES = tuple(METHODS)


def parse_objective(text: str, known: tuple[str, ...] = OBJECTIVES) -> dict[str, float]:
    """Coefficients by name: `"regression + 0.5 * bradley_terry"` has 1 and 0.5.

    Args:
      text: a name, or a sum of several.
      known: the names there are.

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
        if match[2] not in known:
            raise UserError(
                f"config.objective = {text!r}: there are {', '.join(known)}, and sums of them"
            )
        found[match[2]] = coefficient
    if all(name in found for name in _OF_RATINGS):
        raise UserError(
            f"config.objective = {text!r}: a number of the head is a rating or lies among "
            "thresholds, not both: choose one of " + ", ".join(_OF_RATINGS)
        )
    return found


def is_policy(text: str) -> bool:
    """Whether an objective is a policy's, by its names.

    Raises:
      UserError: see `parse_objective`; or it is a policy's and a reward model's at once.
    """
    of_policies = (*POLICY_OBJECTIVES, *ROLLOUT_OBJECTIVES)
    names = parse_objective(text, (*OBJECTIVES, *of_policies))
    policies = [name for name in names if name in of_policies]
    if policies and len(policies) < len(names):
        raise UserError(
            f"config.objective = {text!r}: {', '.join(policies)} is for a policy, the others for a "
            "reward model, and a model is one of them"
        )
    return bool(policies)


def objective_of(config: Config) -> Objective:
    """The objective that a config names; see `make_objective`."""
    data = config.data
    if isinstance(config, AlignConfig):
        return make_rollout_objective(config.objective, config.policy_gradient)
    return make_objective(config.objective, data.attributes, config.preference, data.label_range)


def make_rollout_objective(text: str, config: PolicyGradientConfig) -> Objective:
    """The objective of a policy that learns from its own samples.

    Args:
      text: one of `METHODS`.
      config: of the method.

    Raises:
      UserError: it is none of them.
    """
    if text not in METHODS:
        raise UserError(
            f"config.objective = {text!r}: of a policy's own samples there are {', '.join(METHODS)}"
        )
    return _of_rollouts(policy_gradient(chosen_method(text, config)))


def make_critic_objective(clip: float) -> Objective:
    """The objective of a critic of such samples; see `rollouts.value_error`."""
    return _of_rollouts(value_error(clip))


def _of_rollouts(term: Term) -> Objective:
    return Objective(
        ((1.0, term),), ratings=False, pairs=False, strengths=False, column=0, policy=True
    )


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
    if is_policy(text):
        return make_policy_objective(text, config)
    column = pair_column(attributes, config)
    coefficients = parse_objective(text)
    general = GeneralPreference() if GENERAL in coefficients else None
    if general:
        _check_general(coefficients, attributes, config)
    found = levels(label_range) if "ordinal" in coefficients else None

    def term(name: str) -> Term:
        if name == "regression":
            return Term(squared_error, sum_of_ratings)
        if found and name == "ordinal":
            return Term(ordinal(found[0]), sum_of_ratings)
        if general:
            return general_term(general, config)
        return pair_term(name, column, config)

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


def make_policy_objective(text: str, config: PreferenceConfig) -> Objective:
    """The objective of a policy.

    Args:
      text: names of `POLICY_OBJECTIVES`; see `parse_objective`. Beside pairs, `sft` is of their
        chosen responses.
      config: of the terms that learn from pairs.

    Raises:
      UserError: a name that is none, or settings that mean nothing here.
    """
    if any(name in text for name in ROLLOUT_OBJECTIVES):
        raise UserError(
            f"config.objective = {text!r}: a policy learns it from its own samples; give an "
            "AlignConfig to `python -m rmjax.align`"
        )
    coefficients = parse_objective(text, POLICY_OBJECTIVES)
    pairs = [name for name in coefficients if name != "sft"]
    if pairs and not config.beta > 0:
        raise UserError(f"config.preference.beta = {config.beta}: expected a positive number")
    if config.attribute or config.center_rewards_coefficient:
        raise UserError(
            f"config.preference.attribute = {config.attribute!r} and center_rewards_coefficient = "
            f"{config.center_rewards_coefficient}: a policy has neither columns nor rewards to "
            "centre; leave both out"
        )

    def term(name: str) -> Term:
        if name == "sft":
            return Term(negative_log_likelihood, imitated_tokens)
        return policy_pair_term(name, config)

    return Objective(
        terms=tuple((coefficient, term(name)) for name, coefficient in coefficients.items()),
        ratings=False,
        pairs=bool(pairs),
        strengths=any(name in _NEED_STRENGTHS for name in pairs),
        column=0,
        policy=True,
        beta=config.beta if pairs else 0.0,
        reference=any(name not in WITHOUT_REFERENCE for name in pairs),
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
    if config.attribute or config.center_rewards_coefficient:
        raise UserError(
            f"config.preference.attribute = {config.attribute!r} and center_rewards_coefficient = "
            f"{config.center_rewards_coefficient}: "
            f"{GENERAL!r} has neither a column of its own nor rewards to centre; leave both out"
        )
