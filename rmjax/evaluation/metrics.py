"""How good scores are: of each rated attribute, and of a reward on preference pairs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int, Real


@dataclasses.dataclass(frozen=True)
class AttributeMetrics:
    """Metrics of one attribute on held-out data; NaN where one is not defined.

    Attributes:
      count: how many ratings there are.
      mse: mean squared error.
      mse_constant: mean squared error of always predicting the training data's mean rating.
      pearson: linear correlation.
      spearman: rank correlation; ties get their mean rank.
      pair_accuracy: share of pairs of responses to one prompt with different ratings that the
        scores order as the ratings do; equal scores count one half.
      pairs: how many such pairs there are.
    """

    count: int
    mse: float
    mse_constant: float
    pearson: float
    spearman: float
    pair_accuracy: float
    pairs: int


def attribute_metrics(
    attributes: Sequence[str],
    scores: Float[np.ndarray, "N A"],
    labels: Float[np.ndarray, "N A"],
    prompt_ids: Int[np.ndarray, "N"],
    constants: Float[np.ndarray, "A"],
) -> dict[str, AttributeMetrics]:
    """Computes the metrics of each attribute, in float64.

    Args:
      attributes: their names.
      scores: the model's scores.
      labels: people's ratings; NaN where a rating is missing.
      prompt_ids: samples with the same number answer the same prompt.
      constants: mean rating of each attribute in the training data.
    """
    table = {}
    for column, name in enumerate(attributes):
        present = ~np.isnan(labels[:, column])
        score = scores[present, column].astype(np.float64)
        label = labels[present, column].astype(np.float64)
        agreed, pairs = pair_agreement(score, label, prompt_ids[present])
        table[name] = AttributeMetrics(
            count=len(score),
            mse=float(np.mean((score - label) ** 2)) if len(score) else np.nan,
            mse_constant=(
                float(np.mean((constants[column] - label) ** 2)) if len(score) else np.nan
            ),
            pearson=correlation(score, label),
            spearman=correlation(score, label, ranks=True),
            pair_accuracy=agreed / pairs if pairs else np.nan,
            pairs=pairs,
        )
    return table


def correlation(
    x: Real[np.ndarray, "N"], y: Real[np.ndarray, "N"], *, ranks: bool = False
) -> float:
    """Pearson's correlation, or Spearman's with `ranks`, over the entries where neither is NaN.

    NaN where it is not defined: fewer than two entries, or all values of one side equal.
    """
    present = ~(np.isnan(x) | np.isnan(y))
    x, y = x[present], y[present]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    method: Any = scipy.stats.spearmanr if ranks else scipy.stats.pearsonr
    return float(method(x, y).statistic)


def pair_agreement(
    score: Float[np.ndarray, "N"], label: Float[np.ndarray, "N"], prompt_ids: Int[np.ndarray, "N"]
) -> tuple[float, int]:
    """Over pairs of one prompt with different labels: how many are ordered alike, and how many."""
    agreed, pairs = 0.0, 0
    for members in split_by_prompt(prompt_ids):
        first, second = np.triu_indices(len(members), k=1)
        by_label = np.sign(label[members][first] - label[members][second])
        by_score = np.sign(score[members][first] - score[members][second])
        decided = by_label != 0
        pairs += int(decided.sum())
        agreed += float(np.sum(np.where(by_score == 0, 0.5, by_score == by_label)[decided]))
    return agreed, pairs


def split_by_prompt(prompt_ids: Int[np.ndarray, "N"]) -> list[Int[np.ndarray, "n"]]:
    """The samples' numbers, an array for each prompt."""
    order = np.argsort(prompt_ids, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(prompt_ids[order])) + 1)


def mean_ratings(labels: Float[np.ndarray, "N A"]) -> Float[np.ndarray, "A"]:
    """The mean rating of each attribute; NaN where it has none."""
    present = ~np.isnan(labels)
    sums = np.where(present, labels, 0.0).sum(axis=0, dtype=np.float64)
    counts = present.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def number_or_none(x: float) -> float | None:
    """The number, or None for JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None


# ---- preference pairs ---------------------------------------------------------------------------

CALIBRATION_BINS = 10
_TEMPERATURES = (1e-3, 1e3)  # the range that is searched


@dataclasses.dataclass(frozen=True)
class PairMetrics:
    """Metrics of a reward on held-out preference pairs; NaN where one is not defined.

    Attributes:
      attribute: the reward's name.
      pairs: how many have a preference.
      accuracy: share of them whose chosen response has the higher reward; equal rewards count one
        half.
      low: of accuracy's 95 % interval (Wilson's, as if pairs were independent).
      high: of the same.
      mean_margin: mean reward of the chosen response minus that of the rejected one.
      calibration_error: expected calibration error of sigmoid(margin) (Guo et al., 2017): ten bins
        of the probability of the response with the higher reward, from 1/2 to 1.
      temperature: the T for which sigmoid(margin / T) has the lowest cross-entropy on these pairs;
        NaN where there is none: all pairs are right, or the mean margin is not positive.
      length_correlation: Pearson's correlation of reward and tokens, over all responses.
      by_strength: accuracy and pairs of each strength, the strength written as text.
    """

    attribute: str
    pairs: int
    accuracy: float
    low: float
    high: float
    mean_margin: float
    calibration_error: float
    temperature: float
    length_correlation: float
    by_strength: dict[str, tuple[float, int]]


def pair_metrics(
    attribute: str,
    chosen: Float[np.ndarray, "P"],
    rejected: Float[np.ndarray, "P"],
    strengths: Float[np.ndarray, "P"],
    lengths: Int[np.ndarray, "P 2"],
) -> PairMetrics:
    """Computes the metrics of a reward on preference pairs, in float64.

    Args:
      attribute: the reward's name.
      chosen: rewards of the chosen responses.
      rejected: rewards of the rejected ones.
      strengths: of the preferences; 0 for a tie, which only counts in the correlation with length,
        NaN where the data do not say.
      lengths: tokens of the chosen and of the rejected sample.
    """
    rewards = np.stack([chosen, rejected], axis=1).astype(np.float64)
    decided = strengths != 0
    margins, strengths = (rewards[:, 0] - rewards[:, 1])[decided], strengths[decided]
    right = pair_credits(margins)
    count = len(margins)
    low, high = wilson_interval(float(right.sum()), count)
    known = np.unique(strengths[~np.isnan(strengths)])
    return PairMetrics(
        attribute=attribute,
        pairs=count,
        accuracy=float(right.mean()) if count else np.nan,
        low=low,
        high=high,
        mean_margin=float(margins.mean()) if count else np.nan,
        calibration_error=calibration_error(margins),
        temperature=fit_temperature(margins),
        length_correlation=correlation(rewards.ravel(), lengths.ravel()),
        by_strength={
            f"{strength:g}": (
                float(right[strengths == strength].mean()),
                int((strengths == strength).sum()),
            )
            for strength in known.tolist()
        },
    )


# ---- policies -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PolicyMetrics:
    """What a policy says of held-out responses; NaN where one is not defined.

    Attributes:
      responses: how many there are.
      tokens: of all of them.
      token_log_probability: mean over all these tokens.
      log_ratio: mean over all these tokens of log(policy / reference). It is no KL divergence: the
        tokens are the data's, and not the policy's.
      chosen_log_probability: mean over pairs with a preference, of the sum over the response.
      rejected_log_probability: likewise.
      chosen_reward: the mean implicit reward of these, with the margin in `PairMetrics`.
      rejected_reward: likewise.
    """

    responses: int
    tokens: int
    token_log_probability: float
    log_ratio: float
    chosen_log_probability: float
    rejected_log_probability: float
    chosen_reward: float
    rejected_reward: float


def policy_metrics(
    log_probabilities: Float[np.ndarray, "N"],
    tokens: Real[np.ndarray, "N"],
    reference: Float[np.ndarray, "N"] | None,
    rewards: Float[np.ndarray, "N"] | None,
    pairs: Int[np.ndarray, "P 2"],
) -> PolicyMetrics:
    """Computes the metrics of a policy, in float64.

    Args:
      log_probabilities: of each response, the sum over its tokens.
      tokens: how many each response has.
      reference: the log-probabilities by the reference; None without one.
      rewards: the implicit rewards; None without pairs.
      pairs: the chosen and the rejected response of each pair with a preference.
    """
    logs = log_probabilities.astype(np.float64)
    total = int(tokens.sum())

    def each(values: Float[np.ndarray, "N"] | None) -> tuple[float, float]:
        if values is None or not len(pairs):
            return math.nan, math.nan
        chosen, rejected = values.astype(np.float64)[pairs].mean(axis=0).tolist()
        return chosen, rejected

    return PolicyMetrics(
        len(logs),
        total,
        float(logs.sum() / total),
        float((logs - reference).sum() / total) if reference is not None else math.nan,
        *each(logs),
        *each(rewards),
    )


# ---- intervals, calibration ---------------------------------------------------------------------


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's (1927) 95 % interval of a share; NaN if `count` is 0."""
    if not count:
        return np.nan, np.nan
    share = successes / count
    centre = share + z**2 / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return float((centre - spread) / scale), float((centre + spread) / scale)


def pair_credits(margins: Float[np.ndarray, "P"]) -> Float[np.ndarray, "P"]:
    """1 for each pair with a positive margin, one half where the margin is 0, else 0."""
    return (1 + np.sign(margins)) / 2


def calibration_bins(
    margins: Float[np.ndarray, "P"],
) -> tuple[Float[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Each pair's confidence, sigmoid(|margin|), and its bin of `CALIBRATION_BINS` equal ones."""
    confidence = scipy.special.expit(np.abs(margins))
    bins = (2 * CALIBRATION_BINS * (confidence - 0.5)).astype(int)
    return confidence, np.minimum(bins, CALIBRATION_BINS - 1)


def calibration_error(margins: Float[np.ndarray, "P"]) -> float:
    """Mean over pairs of |accuracy - confidence| of their bin; see `PairMetrics`."""
    if not len(margins):
        return np.nan
    confidence, bins = calibration_bins(margins)
    excess = pair_credits(margins) - confidence
    sums = [np.abs(excess[bins == i].sum()) for i in range(CALIBRATION_BINS)]
    return float(np.sum(sums) / len(margins))


def fit_temperature(margins: Float[np.ndarray, "P"]) -> float:
    """The T of the lowest mean of -log sigmoid(margin / T), a convex function of 1/T."""
    if not len(margins) or not (margins < 0).any() or margins.sum() <= 0:
        return np.nan
    minimum = scipy.optimize.minimize_scalar(
        lambda log: np.logaddexp(0.0, -margins * np.exp(-log)).mean(),
        bounds=np.log(_TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(minimum.x))
