"""What a policy minimises on its own samples, one table of the methods there are; and its critic.

The score at a place is the log-probability of the token behind it, or the critic's value before
that token; `data/batch.py: Rollouts` has what it is compared with. Formulas and sources are in
docs/online.md.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from rmjax.config import AlignConfig, PolicyGradientConfig
from rmjax.data.batch import Rollouts
from rmjax.errors import UserError
from rmjax.models.parameters import Params
from rmjax.training.objectives.base import Scores, Term


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      credit: what multiplies the gradient of a sample's log-probability: how its reward compares
        with those of the prompt's other samples; what a critic did not expect of each of its
        tokens; or the name of a function in `alignment/credits.py`.
      baseline: what a reward is compared with: the mean of the prompt's other samples, or of all.
      ended_baseline: whether only samples that ended are in that mean.
      deviation: what is added to the deviation of a prompt's rewards before advantages are divided
        by it; None if they are not.
      kl_in_reward: how the distance from the reference is taken from the reward: of a sample the
        sum of log(policy / reference) over its tokens, or the mean of its absolute values; of each
        token the absolute value; or not at all.
      kl_in_loss: whether it is in the loss instead, by the estimator k3.
      kl: its coefficient, unless the config has another; of `online_dpo` its beta.
      ratio: what is multiplied by the advantage: the log-probability alone, or policy / old policy
        of each token, or of the whole sample.
      clip: how far below and above 1 the ratio counts.
      average: whether the loss is a mean over tokens, over samples of their means, or over samples
        of their sums.
      fresh: whether credits are worked out before each update, by the policy as it is then.
    """

    credit: Literal["compared", "critic", "best", "pair", "posterior"] = "compared"
    baseline: Literal["others", "all"] = "others"
    ended_baseline: bool = False
    deviation: float | None = None
    kl_in_reward: Literal["", "sum", "mean_of_absolutes", "absolutes"] = ""
    kl_in_loss: bool = False
    kl: float = 0.0
    ratio: Literal["", "token", "sample"] = ""
    clip: tuple[float, float] = (0.2, 0.2)
    average: Literal["token", "sample", "sum"] = "token"
    fresh: bool = False


# With the defaults of their sources: NeMo-Aligner's, and TRL's for RLOO, GRPO and DPO's beta.
METHODS = {
    "reinforce": Method(ended_baseline=True, kl_in_reward="mean_of_absolutes", kl=0.01),
    "rloo": Method(kl_in_reward="sum", kl=0.05, ratio="sample", average="sample"),
    "grpo": Method(baseline="all", deviation=1e-4, kl_in_loss=True, ratio="token"),
    # Dr. GRPO (arXiv 2503.20783): without the deviation.
    "dr_grpo": Method(baseline="all", kl_in_loss=True, ratio="token"),
    "ppo": Method(credit="critic", kl_in_reward="absolutes", kl=0.01, ratio="token"),
    # Of these the loss that is shown only has the method's gradient; see `alignment/credits.py`.
    "steerlm2": Method(credit="posterior", fresh=True),
    "online_dpo": Method(credit="pair", kl=0.1, average="sum", fresh=True),
    "rejection_sampling": Method(credit="best"),
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


def has_critic(config: AlignConfig) -> bool:
    """Whether the method of a config has a critic."""
    return METHODS[config.objective].credit == "critic"


def parse_ratings(text: str) -> dict[str, float]:
    """Ratings by attribute: `helpfulness:4,verbosity:2`.

    Raises:
      UserError: it says none, or those of an attribute twice.
    """
    try:
        parts = [part.split(":") for part in text.split(",")]
        found = {name.strip(): float(rating) for name, rating in parts}
        if "" in found or len(found) < len(parts) or not all(map(math.isfinite, found.values())):
            raise ValueError
        return found
    except ValueError as error:
        raise UserError(
            f"config.policy_gradient.ratings = {text!r}: expected the ratings that answers shall "
            "have, such as 'helpfulness:4,verbosity:2'"
        ) from error


def policy_gradient(method: Method) -> Term:
    """The loss of a method, whose gradient raises the probability of what was better than expected.

    With a ratio r and an advantage A it is -min(r A, clip(r) A) of each token (arXiv 1707.06347,
    eq. 7), without one -A log(policy). To it comes `kl` times the estimator k3 of the distance from
    the reference, exp(-d) + d - 1 with d = log(policy / reference). (k1, d itself, has an expected
    gradient of 0 in a loss: arXiv 2506.09477.)
    """

    def loss(scores: Scores, rollouts: Rollouts, params: Params) -> jax.Array:
        logs, values = jnp.where(rollouts.predicting, scores[..., 0], 0.0), rollouts.values
        advantages = values.advantages
        if method.ratio:
            change = jnp.where(rollouts.predicting, logs - values.old, 0.0)
            if method.ratio == "sample":
                change = _of_whole_samples(change, rollouts.slots)
            ratio, (below, above) = jnp.exp(change), method.clip
            clipped = jnp.clip(ratio, 1 - below, 1 + above)
            losses = -jnp.minimum(ratio * advantages, clipped * advantages)
        else:
            losses = -advantages * logs
        if method.kl_in_loss and method.kl:
            distance = logs - values.reference
            losses += method.kl * (jnp.exp(-distance) + distance - 1)
        return jnp.sum(values.shares * losses)

    return Term(loss, _shares)


def value_error(clip: float) -> Term:
    """The loss of a critic: half the squared error of its values, the larger one of two.

    The other is of values that moved at most `clip` in the step (NeMo-Aligner's PPO, and others).
    """

    def loss(scores: Scores, rollouts: Rollouts, params: Params) -> jax.Array:
        values = rollouts.values
        found = jnp.where(rollouts.predicting, scores[..., 0], 0.0)
        held = values.old + jnp.clip(found - values.old, -clip, clip)
        errors = [jnp.square(value - values.returns) for value in (found, held)]
        return 0.5 * jnp.sum(values.shares * jnp.maximum(*errors))

    return Term(loss, _shares)


def _shares(rollouts: Rollouts) -> jax.Array:
    return jnp.sum(rollouts.values.shares)


def _of_whole_samples(values: jax.Array, slots: jax.Array) -> jax.Array:
    """At each place the sum of `values` [..., L] over the places of its sample."""
    length = values.shape[-1]  # a row has fewer samples than places
    flat, numbers = values.reshape(-1, length), slots.reshape(-1, length)
    sums = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, num_segments=length))(flat, numbers)
    return jnp.take_along_axis(sums, numbers, axis=1).reshape(values.shape)
