"""What a policy minimises on its own samples: policy gradients, one table of the methods there are.

The score at a place is the log-probability of the token behind it; `data/batch.py: Rollouts` has
what it is compared with. Formulas and sources are in docs/objectives.md.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from rmjax.config import PolicyGradientConfig
from rmjax.data.batch import Rollouts
from rmjax.models.parameters import Params
from rmjax.training.objectives.base import Scores, Term


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      baseline: what a sample's reward is compared with: the mean reward of the prompt's other
        samples, or of all of them.
      ended_baseline: whether only samples that ended are in that mean.
      deviation: what is added to the deviation of a prompt's rewards before advantages are divided
        by it; None if they are not.
      kl_in_reward: how the distance from the reference is taken from a sample's reward: the sum of
        log(policy / reference) over its tokens, the mean of its absolute values, or not at all.
      kl_in_loss: whether it is in the loss instead, by the estimator k3.
      kl: its coefficient, unless the config has another.
      ratio: what is multiplied by the advantage: the log-probability alone, or policy / old policy
        of each token, or of the whole sample.
      clip: how far below and above 1 the ratio counts.
      average: whether the loss is a mean over tokens, or over samples of their means.
    """

    baseline: Literal["others", "all"]
    ended_baseline: bool
    deviation: float | None
    kl_in_reward: Literal["", "sum", "mean_of_absolutes"]
    kl_in_loss: bool
    kl: float
    ratio: Literal["", "token", "sample"]
    clip: tuple[float, float]
    average: Literal["token", "sample"]


# With the defaults of their sources: NeMo-Aligner's REINFORCE, TRL's RLOO and GRPO.
METHODS = {
    "reinforce": Method(
        baseline="others",
        ended_baseline=True,
        deviation=None,
        kl_in_reward="mean_of_absolutes",
        kl_in_loss=False,
        kl=0.01,
        ratio="",
        clip=(0.0, 0.0),
        average="token",
    ),
    "rloo": Method(
        baseline="others",
        ended_baseline=False,
        deviation=None,
        kl_in_reward="sum",
        kl_in_loss=False,
        kl=0.05,
        ratio="sample",
        clip=(0.2, 0.2),
        average="sample",
    ),
    "grpo": Method(
        baseline="all",
        ended_baseline=False,
        deviation=1e-4,
        kl_in_reward="",
        kl_in_loss=True,
        kl=0.0,
        ratio="token",
        clip=(0.2, 0.2),
        average="token",
    ),
    # Dr. GRPO (arXiv 2503.20783): without the deviation.
    "dr_grpo": Method(
        baseline="all",
        ended_baseline=False,
        deviation=None,
        kl_in_reward="",
        kl_in_loss=True,
        kl=0.0,
        ratio="token",
        clip=(0.2, 0.2),
        average="token",
    ),
}


def chosen_method(name: str, config: PolicyGradientConfig) -> Method:
    """The method of this name, with what the config says otherwise."""
    method = METHODS[name]
    below, above = config.clip_below, config.clip_above
    return dataclasses.replace(
        method,
        kl=method.kl if config.kl is None else config.kl,
        clip=(
            method.clip[0] if below is None else below,
            method.clip[1] if above is None else above,
        ),
    )


def policy_gradient(method: Method) -> Term:
    """The loss of a method, whose gradient raises the probability of what was better than expected.

    With a ratio r and an advantage A it is -min(r A, clip(r) A) of each token (arXiv 1707.06347,
    eq. 7), without one -A log(policy). To it comes `kl` times the estimator k3 of the distance from
    the reference, exp(-d) + d - 1 with d = log(policy / reference). (k1, d itself, has an expected
    gradient of 0 in a loss: arXiv 2506.09477.)
    """

    def loss(scores: Scores, rollouts: Rollouts, params: Params) -> jax.Array:
        logs = jnp.where(rollouts.predicting, scores[..., 0], 0.0)
        advantages = rollouts.advantages
        if method.ratio:
            change = jnp.where(rollouts.predicting, logs - rollouts.old, 0.0)
            if method.ratio == "sample":
                change = _of_whole_samples(change, rollouts.slots)
            ratio, (below, above) = jnp.exp(change), method.clip
            clipped = jnp.clip(ratio, 1 - below, 1 + above)
            losses = -jnp.minimum(ratio * advantages, clipped * advantages)
        else:
            losses = -advantages * logs
        if method.kl_in_loss and method.kl:
            distance = logs - rollouts.reference
            losses += method.kl * (jnp.exp(-distance) + distance - 1)
        return jnp.sum(rollouts.shares * losses)

    return Term(loss, lambda rollouts: jnp.sum(rollouts.shares))


def _of_whole_samples(values: jax.Array, slots: jax.Array) -> jax.Array:
    """At each place the sum of `values` [..., L] over the places of its sample."""
    length = values.shape[-1]  # a row has fewer samples than places
    flat, numbers = values.reshape(-1, length), slots.reshape(-1, length)
    sums = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, num_segments=length))(flat, numbers)
    return jnp.take_along_axis(sums, numbers, axis=1).reshape(values.shape)
