"""Terms that a policy learns from: responses to imitate, and pairs of them.

The score of a sample is the log-probability of its response, the sum over its tokens.
"""

import jax
import jax.numpy as jnp

from rmjax.config import PreferenceConfig
from rmjax.data.batch import Pairs, PolicyTargets
from rmjax.models.parameters import Params
from rmjax.training.objectives.base import Rewards, Scores, Term
from rmjax.training.objectives.pairs import (
    OF_MARGINS,
    chosen_is_better,
    pair_rewards,
    pair_weights,
)

# Losses of the implicit reward's margin that reward models have, too.
_OF_REWARDS = {
    "dpo": "bradley_terry",
    "margin_dpo": "margin_bradley_terry",
    "scaled_dpo": "scaled_bradley_terry",
}
OF_POLICY_PAIRS = (*_OF_REWARDS, "ipo")


def negative_log_likelihood(scores: Scores, targets: PolicyTargets, params: Params) -> jax.Array:
    """Of all tokens of the responses to imitate, summed."""
    imitated = targets.responses.imitated
    return -jnp.sum(imitated * jnp.where(imitated > 0, scores[..., 0], 0.0))


def imitated_tokens(targets: PolicyTargets) -> jax.Array:
    """How many tokens these responses have."""
    return jnp.sum(targets.responses.imitated * targets.responses.lengths)


def implicit_rewards(scores: Scores, targets: PolicyTargets, beta: float) -> Scores:
    """beta log(policy / reference) of each response: DPO's reward (arXiv 2305.18290, eq. 5)."""
    return beta * (scores - targets.responses.reference[..., None])


def policy_pair_term(name: str, config: PreferenceConfig) -> Term:
    """The term `name`, one of `OF_POLICY_PAIRS`, of the margins between implicit rewards.

    Args:
      name: of the term.
      config: `beta`; `label_smoothing` and `ties`, which mean what they do for reward models.
    """
    beta = config.beta

    def loss(scores: Scores, targets: PolicyTargets, params: Params) -> jax.Array:
        pairs = targets.pairs
        rewards = implicit_rewards(scores, targets, beta)
        chosen, rejected = pair_rewards(rewards, pairs, column=0)
        margins = chosen - rejected
        if name == "ipo":
            found = _ipo(margins / beta, pairs, beta, config)
        else:
            found = OF_MARGINS[_OF_REWARDS[name]](margins, pairs, config)
        return jnp.sum(pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(pair_weights(targets.pairs, config)))


def _ipo(ratios: Rewards, pairs: Pairs, beta: float, config: PreferenceConfig) -> Rewards:
    """(h - 1 / 2 beta)^2 with h the difference of log(policy / reference) (arXiv 2310.12036).

    With the probability 1 - p it is that of the opposite pair.
    """
    p, goal = chosen_is_better(pairs, config), 1 / (2 * beta)
    return p * jnp.square(ratios - goal) + (1 - p) * jnp.square(ratios + goal)
