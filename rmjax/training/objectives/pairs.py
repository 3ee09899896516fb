"""Terms that learn from pairs."""

import jax
import jax.numpy as jnp

from rmjax.config import PreferenceConfig
from rmjax.data.batch import Pairs, Targets
from rmjax.errors import UserError
from rmjax.models.parameters import Params
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.training.objectives.base import Rewards, Scores, Term


def pair_rewards(scores: Scores, pairs: Pairs, column: int) -> tuple[Rewards, Rewards]:
    """Of the chosen and of the rejected; 0 where there is no pair, whose slots hold anything."""
    reward = scores[..., column]
    found = [jnp.take_along_axis(reward, s, axis=-1) for s in (pairs.chosen, pairs.rejected)]
    chosen, rejected = (jnp.where(pairs.weights > 0, r, 0.0) for r in found)
    return chosen, rejected


def pair_weights(pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """How much each pair counts: 0 where there is none."""
    learned = pairs.strengths > 0 if config.ties == "zero_weight" else True
    return jnp.where(learned, pairs.weights, 0.0)


def chosen_is_better(pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """The probability p that a pair's chosen sample is the better one; 1/2 in a tie."""
    return jnp.where(pairs.strengths > 0, 1 - config.label_smoothing, 0.5)


def _cross_entropy(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin), p as `chosen_is_better` gives it."""
    p = chosen_is_better(pairs, config)
    return p * jax.nn.softplus(-margins) + (1 - p) * jax.nn.softplus(margins)


def _margin_bradley_terry(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    assert margins.shape == pairs.strengths.shape  # a margin for each pair, none for all pairs
    return _cross_entropy(margins - pairs.strengths, pairs, config)


def _scaled_bradley_terry(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    assert margins.shape == pairs.strengths.shape
    return pairs.strengths * _cross_entropy(margins, pairs, config)


OF_MARGINS = {
    "bradley_terry": _cross_entropy,
    "margin_bradley_terry": _margin_bradley_terry,
    "scaled_bradley_terry": _scaled_bradley_terry,
}


def pair_term(name: str, column: int, config: PreferenceConfig) -> Term:
    """The term `name` of the margins between rewards, which are the head's output `column`."""

    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        pairs = targets.pairs
        chosen, rejected = pair_rewards(scores, pairs, column)
        found = OF_MARGINS[name](chosen - rejected, pairs, config)
        if config.center_rewards_coefficient:
            found += config.center_rewards_coefficient * jnp.square(chosen + rejected)
        return jnp.sum(pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(pair_weights(targets.pairs, config)))


def general_term(general: GeneralPreference, config: PreferenceConfig) -> Term:
    """The term that compares the head's outputs as vectors."""

    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        pairs = targets.pairs
        there = pairs.weights[..., None] > 0
        chosen, rejected = (
            jnp.where(there, jnp.take_along_axis(scores, slots[..., None], axis=-2), 0.0)
            for slots in (pairs.chosen, pairs.rejected)
        )
        found = _cross_entropy(general.margins(chosen, rejected), pairs, config)
        return jnp.sum(pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(pair_weights(targets.pairs, config)))


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
