"""Terms that a policy learns from: responses to imitate, and pairs of them.

The score of a sample is the log-probability of its response, the sum over its tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rmjax.config import PreferenceConfig
from rmjax.data.batch import Pairs, PolicyTargets, Responses
from rmjax.models.parameters import Params
from rmjax.training.objectives.base import Rewards, Scores, Term
from rmjax.training.objectives.pairs import (
    OF_MARGINS,
    chosen_is_better,
    pair_rewards,
    pair_weights,
)


def negative_log_likelihood(scores: Scores, targets: PolicyTargets, params: Params) -> jax.Array:
    """Of all tokens of the responses to imitate, summed."""
    imitated = targets.responses.imitated
    return -jnp.sum(imitated * jnp.where(imitated > 0, scores[..., 0], 0.0))


def imitated_tokens(targets: PolicyTargets) -> jax.Array:
    """How many tokens these responses have."""
    return jnp.sum(targets.responses.imitated * targets.responses.lengths)


def implicit_rewards(
    scores: Scores, responses: Responses, beta: float, reference: bool = True
) -> Scores:
    """The reward of each response that a policy of these log-probabilities maximises.

    With a reference that is beta log(policy / reference), DPO's (arXiv 2305.18290, eq. 5), without
    one the mean over the response's tokens of beta log(policy), SimPO's (arXiv 2405.14734, eq. 4).
    """
    if reference:
        return beta * (scores - responses.reference[..., None])
    return beta * scores / jnp.maximum(responses.lengths, 1.0)[..., None]


def _both_ways(
    loss: Callable[[Rewards], Rewards], margins: Rewards, pairs: Pairs, config: PreferenceConfig
) -> Rewards:
    """The loss of a pair's margin, and with the probability 1 - p that of the opposite pair's."""
    p = chosen_is_better(pairs, config)
    return p * loss(margins) + (1 - p) * loss(-margins)


def _ipo(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """(h - 1 / 2 beta)^2 with h the difference of log(policy / reference) (arXiv 2310.12036)."""

    def loss(margins: Rewards) -> Rewards:
        return jnp.square(margins / config.beta - 1 / (2 * config.beta))

    return _both_ways(loss, margins, pairs, config)


def _simpo(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """-log sigmoid(margin - gamma) (arXiv 2405.14734, eq. 6); a tie asks for no margin.

    As TRL has it, a pair with a wrong label is one that misses gamma, not one that exceeds it.
    """
    asked = jnp.where(pairs.strengths > 0, config.gamma, 0.0)
    return OF_MARGINS["bradley_terry"](margins - asked, pairs, config)


def _wanted(pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """The margin that a strength stands for."""
    assert pairs.strengths.shape == pairs.weights.shape  # one for each pair
    return config.strength_scale * pairs.strengths


def _divergence(of: Rewards, to: Rewards) -> Rewards:
    """KL of the preference with probability sigmoid(of) from that with sigmoid(to)."""

    def part(sign: int) -> Rewards:
        gap = jax.nn.log_sigmoid(sign * of) - jax.nn.log_sigmoid(sign * to)
        return jax.nn.sigmoid(sign * of) * gap

    return part(1) + part(-1)


def _rpo_bwd_kl(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    wanted = _wanted(pairs, config)
    return _both_ways(lambda m: _divergence(wanted, m), margins, pairs, config)


def _rpo_fwd_kl(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    wanted = _wanted(pairs, config)
    return _both_ways(lambda m: _divergence(m, wanted), margins, pairs, config)


def _rpo_sq(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    wanted = _wanted(pairs, config)
    return _both_ways(lambda m: jnp.square(m - wanted), margins, pairs, config)


# Of the margin between implicit rewards. RPO's names are those of NeMo-Aligner.
OF_POLICY_PAIRS = {
    "dpo": OF_MARGINS["bradley_terry"],
    "margin_dpo": OF_MARGINS["margin_bradley_terry"],
    "scaled_dpo": OF_MARGINS["scaled_bradley_terry"],
    "ipo": _ipo,
    "rpo_bwd_kl": _rpo_bwd_kl,
    "rpo_fwd_kl": _rpo_fwd_kl,
    "rpo_sq": _rpo_sq,
    "simpo": _simpo,
}
WITHOUT_REFERENCE = ("simpo",)


def policy_pair_term(name: str, config: PreferenceConfig) -> Term:
    """The term `name`, one of `OF_POLICY_PAIRS`, of the margins between implicit rewards.

    Args:
      name: of the term.
      config: `beta`; `label_smoothing` and `ties`, which mean what they do for reward models; and
        of some terms `gamma` or `strength_scale`.
    """
    reference = name not in WITHOUT_REFERENCE

    def loss(scores: Scores, targets: PolicyTargets, params: Params) -> jax.Array:
        pairs = targets.pairs
        rewards = implicit_rewards(scores, targets.responses, config.beta, reference)
        chosen, rejected = pair_rewards(rewards, pairs, column=0)
        found = OF_POLICY_PAIRS[name](chosen - rejected, pairs, config)
        return jnp.sum(pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(pair_weights(targets.pairs, config)))
