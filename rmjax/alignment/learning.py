"""What a step's samples are learned by, token by token; and what there is to say of them."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64

from rmjax.alignment.advantages import generalized_advantages
from rmjax.alignment.credits import CREDITS, Samples
from rmjax.alignment.rollouts import Rollout
from rmjax.config import AlignConfig, ShapingConfig
from rmjax.data.tokenized import TokenizedData, TokenReturns, TokenValues
from rmjax.training.objectives.rollouts import Method

Tokens = Float32[np.ndarray, "T"]


class Known(NamedTuple):
    """What models say of each of the data's tokens; 0 of the prompts'.

    Attributes:
      old: the log-probability by the policy that is trained, before the step.
      entropy: of what the token was drawn from, by the same.
      reference: the log-probability by the reference.
      sampled: by the sampler, which should be that of `old`.
    """

    old: Tokens
    entropy: Tokens
    reference: Tokens
    sampled: Tokens


def penalised(rollout: Rollout, config: ShapingConfig) -> Float64[np.ndarray, "P n"]:
    """Rewards less the penalties of the config."""
    unended = np.where(rollout.ended, 0.0, config.unended_penalty)
    return rollout.rewards - unended - config.length_penalty * rollout.lengths


def learnable(rollout: Rollout, config: ShapingConfig) -> Bool[np.ndarray, "P n"]:
    """Which samples may be learned from, if they have a reward."""
    return rollout.ended | config.learn_unended


def credited(
    rollout: Rollout,
    data: TokenizedData,
    known: Known,
    now: Tokens,
    method: Method,
    config: AlignConfig,
) -> tuple[TokenizedData, dict[str, float]]:
    """Samples with what they are learned by, and what there is to say of that.

    Args:
      rollout: the samples.
      data: their tokens, in the same order.
      known: what models say of them.
      now: log-probabilities by the policy as it is.
      method: how they are learned from.
      config: of the run.
    """

    def by_sample(values: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat(values.astype(np.float64), data.offsets[:-1])
        return sums.reshape(rollout.rewards.shape)

    change = known.old.astype(np.float64) - known.reference
    samples = Samples(
        rewards=penalised(rollout, config.shaping),
        ended=rollout.ended,
        learnable=learnable(rollout, config.shaping),
        lengths=rollout.lengths,
        old=by_sample(known.old),
        now=by_sample(now),
        reference=by_sample(known.reference),
        absolutes=by_sample(np.abs(change)),
        attributes=rollout.attributes,
    )
    found = CREDITS[method.credit](samples, method, config)
    credits, shares = found.credits, found.learned.astype(np.float64)
    if method.average != "token":
        shares = shares / rollout.lengths
    if method.average == "sum":
        credits = credits * rollout.lengths
    values = TokenValues(
        known.old, known.reference, _by_token(data, credits), _by_token(data, shares)
    )
    teaching = (found.credits != 0) & found.learned
    numbers = {"without_advantage": float((~teaching.any(axis=1)).sum())} | found.numbers
    return dataclasses.replace(data, values=values), numbers


def expected_by_critic(
    rollout: Rollout,
    data: TokenizedData,
    known: Known,
    expected: Tokens,
    method: Method,
    config: AlignConfig,
) -> tuple[TokenizedData, TokenizedData, dict[str, float]]:
    """Samples as a policy learns from them by a critic, as the critic does, and numbers.

    The reward stands at a sample's last token, and each token pays for its distance from the
    reference. Advantages are normalised over the tokens of the step (NeMo-Aligner).

    Args:
      rollout: the samples.
      data: their tokens, in the same order.
      known: what models say of them.
      expected: the critic's value before each token.
      method: how they are learned from.
      config: of the run.
    """
    rewards = penalised(rollout, config.shaping)
    learned = learnable(rollout, config.shaping) & ~np.isnan(rewards)
    shares = _by_token(data, learned.astype(np.float64))
    change = np.abs(known.old.astype(np.float64) - known.reference)
    of_tokens = -method.kl * change if method.kl_in_reward == "absolutes" else np.zeros(len(change))
    of_tokens[data.offsets[1:] - 1] += np.where(learned, rewards, 0.0).ravel()
    lengths = rollout.lengths.ravel().astype(np.int64)
    advantages = generalized_advantages(
        of_tokens,
        expected.astype(np.float64),
        data.offsets[1:] - lengths,
        lengths,
        config.critic.discount,
        config.critic.smoothing,
    )
    returns, there = advantages + expected, shares > 0
    if there.any():
        advantages -= advantages[there].mean()
        advantages /= advantages[there].std() + 1e-8
    with np.errstate(over="ignore"):  # as in `_by_token`
        values = [np.where(there, x, 0.0).astype(np.float32) for x in (advantages, returns)]
    error, spread = np.square(expected - returns)[there], returns[there]
    numbers = {
        "value": float(expected[there].mean()) if there.any() else np.nan,
        "value_explained": float(1 - error.mean() / spread.var()) if spread.std() else np.nan,
        "without_advantage": float((~learned).all(axis=1).sum()),
    }
    of_policy = TokenValues(known.old, known.reference, values[0], shares)
    of_critic = TokenReturns(expected, values[1], shares)
    policy, critic = (dataclasses.replace(data, values=x) for x in (of_policy, of_critic))
    return policy, critic, numbers


def described(rollout: Rollout, data: TokenizedData, known: Known) -> dict[str, float]:
    """A step's numbers, before penalties and distances."""
    ratio = known.old.astype(np.float64) - known.reference
    tokens, gap = rollout.lengths.sum(), np.abs(known.old - known.sampled)
    with np.errstate(over="ignore"):  # a number that is infinite stops the run
        reward, deviation = np.nanmean(rollout.rewards), np.nanstd(rollout.rewards)
    return {
        "reward": float(reward),
        "reward_deviation": float(deviation),
        "kl": float(ratio.sum() / rollout.rewards.size),
        "kl_per_token": float(ratio.sum() / tokens),
        "entropy": float(known.entropy.sum() / tokens),
        "length": float(rollout.lengths.mean()),
        "ended": float(rollout.ended.mean()),
        "without_reward": float(np.isnan(rollout.rewards).sum()),
        "sampler_gap": float(gap.sum() / tokens),
        "sampler_gap_largest": float(gap.max()),
    }


def _by_token(data: TokenizedData, values: Float64[np.ndarray, "P n"]) -> Tokens:
    """Each sample's value at its tokens, 0 at those of prompts."""
    assert data.spoken is not None
    with np.errstate(over="ignore"):  # a loss that is infinite for it stops the run
        return np.where(data.spoken, np.repeat(values.ravel(), data.lengths), 0).astype(np.float32)
