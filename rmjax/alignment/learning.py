"""From a step's samples to the batches of its updates, and to what there is to say of them."""

import dataclasses
from typing import NamedTuple

import numpy as np

from rmjax.alignment.advantages import advantages_of, shaped_rewards
from rmjax.alignment.rollouts import Rollout
from rmjax.config import ShapingConfig
from rmjax.data.tokenized import TokenizedData, TokenValues
from rmjax.training.objectives.rollouts import Method


class Known(NamedTuple):
    """What models say of each of the data's tokens; 0 of the prompts'.

    Attributes:
      old: the log-probability by the policy that is trained, before the step.
      entropy: of what the token was drawn from, by the same.
      reference: the log-probability by the reference.
      sampled: by the sampler, which should be that of `old`.
    """

    old: np.ndarray
    entropy: np.ndarray
    reference: np.ndarray
    sampled: np.ndarray


def penalised(rollout: Rollout, config: ShapingConfig) -> np.ndarray:
    """Rewards [P, n] less the penalties of the config."""
    unended = np.where(rollout.ended, 0.0, config.unended_penalty)
    return rollout.rewards - unended - config.length_penalty * rollout.lengths


def learned_data(
    rollout: Rollout, data: TokenizedData, known: Known, method: Method, config: ShapingConfig
) -> tuple[TokenizedData, dict[str, float]]:
    """The samples with what they are learned by, and the step's numbers.

    Args:
      rollout: the samples.
      data: their tokens, in the same order.
      known: what models say of them.
      method: how they are learned from.
      config: penalties, and which samples are learned from.
    """
    shape = rollout.rewards.shape
    ratio = known.old.astype(np.float64) - known.reference

    def by_sample(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, data.offsets[:-1]).reshape(shape)

    ended, lengths = rollout.ended, rollout.lengths
    sums, absolutes = by_sample(ratio), by_sample(np.abs(ratio))
    rewards = shaped_rewards(penalised(rollout, config), sums, absolutes, lengths, method)
    advantages = advantages_of(rewards, ended, method)
    learned = ~np.isnan(rewards) & (ended | config.learn_unended)
    shares = learned / (lengths if method.average == "sample" else 1.0)

    def by_token(values: np.ndarray) -> np.ndarray:
        assert data.spoken is not None
        return np.where(data.spoken, np.repeat(values.ravel(), data.lengths), 0).astype(np.float32)

    values = TokenValues(known.old, known.reference, by_token(advantages), by_token(shares))
    tokens, gap = lengths.sum(), np.abs(known.old - known.sampled)
    numbers = {
        "reward": float(np.nanmean(rollout.rewards)),
        "reward_deviation": float(np.nanstd(rollout.rewards)),
        "kl": float(sums.mean()),
        "kl_per_token": float(ratio.sum() / tokens),
        "entropy": float(known.entropy.sum() / tokens),
        "length": float(lengths.mean()),
        "ended": float(ended.mean()),
        "without_reward": float(np.isnan(rollout.rewards).sum()),
        "without_advantage": float((~advantages.any(axis=1)).sum()),
        "sampler_gap": float(gap.sum() / tokens),
        "sampler_gap_largest": float(gap.max()),
    }
    return dataclasses.replace(data, values=values), numbers
