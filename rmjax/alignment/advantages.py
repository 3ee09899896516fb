"""How much better than expected a sample, or a token of it, is. All in float64, on the host."""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from rmjax.training.objectives.rollouts import Method

Rewards = Float64[np.ndarray, "P n"]


def shaped_rewards(
    rewards: Rewards, sums: Rewards, absolutes: Rewards, lengths: Rewards, method: Method
) -> Rewards:
    """Rewards less what a method takes for the distance from the reference.

    Args:
      rewards: of each sample of each prompt.
      sums: over a sample's tokens, of log(policy / reference).
      absolutes: likewise, of its absolute values.
      lengths: how many tokens a sample has.
      method: see `Method.kl_in_reward`.
    """
    if method.kl_in_reward == "sum":
        return rewards - method.kl * sums
    if method.kl_in_reward == "mean_of_absolutes":
        return rewards - method.kl * absolutes / np.maximum(lengths, 1)
    return rewards


def advantages_of(rewards: Rewards, ended: Bool[np.ndarray, "P n"], method: Method) -> Rewards:
    """The advantage of each sample; 0 of one without a reward, and where nothing compares with it.

    Args:
      rewards: of each sample of each prompt; NaN where there is none. Such samples are in no
        baseline.
      ended: whether each came to an end by itself.
      method: see `Method.baseline`.
    """
    known = ~np.isnan(rewards)
    # Told from the highest one, so that those of equal rewards are 0 and not what rounding leaves.
    rewards = rewards - rewards.max(1, keepdims=True, where=known, initial=-np.inf)
    counted = known & ended if method.ended_baseline else known
    values, counts = np.where(counted, rewards, 0.0), counted.astype(np.float64)
    total, count = values.sum(1, keepdims=True), counts.sum(1, keepdims=True)
    if method.baseline == "others":
        total, count = total - values, count - counts
    compared = known & (count > 0)
    found = np.where(compared, rewards - total / np.maximum(count, 1), 0.0)
    if method.deviation is not None:
        found /= _deviation(rewards, known) + method.deviation
    return found


def generalized_advantages(
    rewards: Float64[np.ndarray, "T"],
    values: Float64[np.ndarray, "T"],
    starts: Int64[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "N"],
    discount: float,
    smoothing: float,
) -> Float64[np.ndarray, "T"]:
    """How much better than a critic expected it was to say each token of N samples.

    A_t is the sum over k of (discount x smoothing)^k d_(t+k), with d_t = r_t + discount x V_(t+1) -
    V_t and a value of 0 after the last token (arXiv 1506.02438, eq. 16).

    Args:
      rewards: of each token.
      values: what the critic expected before it.
      starts: of each sample's tokens; those between samples have no advantage.
      lengths: how many a sample has.
      discount: of what comes a token later.
      smoothing: lambda.
    """
    found = np.zeros(len(rewards))
    longest = int(lengths.max(initial=0))
    after = np.zeros(len(starts))  # of each sample, the advantage and the value one token later
    later = np.zeros(len(starts))
    for place in reversed(range(longest)):
        there = lengths > place
        at = starts[there] + place
        step = rewards[at] + discount * later[there] - values[at]
        after[there] = found[at] = step + discount * smoothing * after[there]
        later[there] = values[at]
    return found


def _deviation(rewards: Rewards, known: Bool[np.ndarray, "P n"]) -> Float64[np.ndarray, "P 1"]:
    """The sample deviation of a prompt's rewards, by n - 1; 0 of fewer than two."""
    count = known.sum(1, keepdims=True)
    mean = np.where(known, rewards, 0.0).sum(1, keepdims=True) / np.maximum(count, 1)
    with np.errstate(over="ignore"):  # then the step's `reward_deviation` is infinite, too
        squares = np.where(known, np.square(rewards - mean), 0.0).sum(1, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))
