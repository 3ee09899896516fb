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


def implicit_rewards(scores: Scores, responses: Responses, beta: float) -> Scores:
    """beta log(policy / reference) of each response: DPO's reward (arXiv 2305.18290, eq. 5)."""
    return beta * (scores - responses.reference[..., None])


def mean_rewards(scores: Scores, responses: Responses, beta: float) -> Scores:
    """beta times the mean log-probability of a response's tokens (arXiv 2405.14734, eq. 4)."""
    return beta * scores / jnp.maximum(responses.lengths[..., None], 1.0)


def policy_pair_term(name: str, config: PreferenceConfig) -> Term:
    """The term `name`, a key of `OF_POLICY_PAIRS`, of the margins between a policy's rewards.

    Args:
      name: of the term.
      config: `beta` and `gamma`; `label_smoothing` and `ties`, which mean what they do for reward
        models.
    """
    reward, of_margins = policy_rewards(name), OF_POLICY_PAIRS[name]

    def loss(scores: Scores, targets: PolicyTargets, params: Params) -> jax.Array:
        pairs = targets.pairs
        rewards = reward(scores, targets.responses, config.beta)
        chosen, rejected = pair_rewards(rewards, pairs, column=0)
        found = of_margins(chosen - rejected, pairs, config)
        return jnp.sum(pair_weights(pairs, config) * found)

    return Term(loss, lambda targets: jnp.sum(pair_weights(targets.pairs, config)))


def policy_rewards(name: str) -> Callable[[Scores, Responses, float], Scores]:
    """What the term `name` takes for a response's reward, of its log-probability."""
    return mean_rewards if name in WITHOUT_REFERENCE else implicit_rewards


def _ipo(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """(h - 1 / 2 beta)^2 with h the difference of log(policy / reference) (arXiv 2310.12036).

    With the probability 1 - p it is that of the opposite pair.
    """
    p, ratios, goal = chosen_is_better(pairs, config), margins / config.beta, 1 / (2 * config.beta)
    return p * jnp.square(ratios - goal) + (1 - p) * jnp.square(ratios + goal)


def _simpo(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
    """-log sigmoid(margin - gamma) (arXiv 2405.14734, eq. 6)."""
    p, gamma = chosen_is_better(pairs, config), config.gamma
    return p * jax.nn.softplus(gamma - margins) + (1 - p) * jax.nn.softplus(gamma + margins)


# RPO: the margin shall be what the given rewards' is, in one of three distances (Nemotron-4 340B,
# arXiv 2406.11704, 3.3.2; the names are NeMo-Aligner's).


def _of_given_margins(
    distance: Callable[[Rewards, Rewards], Rewards],
) -> Callable[[Rewards, Pairs, PreferenceConfig], Rewards]:
    def loss(margins: Rewards, pairs: Pairs, config: PreferenceConfig) -> Rewards:
        p, given = chosen_is_better(pairs, config), pairs.strengths
        return p * distance(margins, given) + (1 - p) * distance(margins, -given)

    return loss


def _square(margins: Rewards, given: Rewards) -> Rewards:
    return jnp.square(margins - given)


def _backward_kl(margins: Rewards, given: Rewards) -> Rewards:
    """From what the margin says of which response is better to what the given one says."""
    return _bernoulli_kl(given, margins)


def _forward_kl(margins: Rewards, given: Rewards) -> Rewards:
    return _bernoulli_kl(margins, given)


def _bernoulli_kl(p: Rewards, q: Rewards) -> Rewards:
    """KL divergence of Bernoulli(sigmoid(p)) from Bernoulli(sigmoid(q))."""
    log = jax.nn.log_sigmoid
    better, worse = jax.nn.sigmoid(p), jax.nn.sigmoid(-p)
    return better * (log(p) - log(q)) + worse * (log(-p) - log(-q))


OF_POLICY_PAIRS = {
    "dpo": OF_MARGINS["bradley_terry"],
    "margin_dpo": OF_MARGINS["margin_bradley_terry"],
    "scaled_dpo": OF_MARGINS["scaled_bradley_terry"],
    "ipo": _ipo,
    "rpo_sq": _of_given_margins(_square),
    "rpo_bwd_kl": _of_given_margins(_backward_kl),
    "rpo_fwd_kl": _of_given_margins(_forward_kl),
    "simpo": _simpo,
}
WITHOUT_REFERENCE = ("simpo",)
NEED_STRENGTHS = ("margin_dpo", "scaled_dpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
