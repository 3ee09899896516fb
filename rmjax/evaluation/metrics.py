"""How good scores are: per attribute, against the constant mean, and on pairs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special, stats


@dataclasses.dataclass(frozen=True)
class AttributeMetrics:
    """One attribute on held-out data; NaN where it is not defined.

    Attributes:
      count: ratings that are present.
      mse: mean squared error.
      mse_constant: that of always answering the mean rating of the training data.
      pearson: linear correlation.
      spearman: rank correlation, ties at their mean rank.
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
    groups: Int[np.ndarray, "N"],
    constants: Float[np.ndarray, "A"],
) -> dict[str, AttributeMetrics]:
    """Metrics of each attribute, computed in float64.

    Args:
      attributes: their names.
      scores: what the model says.
      labels: what people say; NaN where nobody did.
      groups: samples with the same number answer the same prompt.
      constants: mean rating of each attribute in the training data.
    """
    table = {}
    for column, name in enumerate(attributes):
        present = ~np.isnan(labels[:, column])
        score = scores[present, column].astype(np.float64)
        label = labels[present, column].astype(np.float64)
        agreed, pairs = pair_agreement(score, label, groups[present])
        table[name] = AttributeMetrics(
            count=len(score),
            mse=float(np.mean((score - label) ** 2)) if len(score) else np.nan,
            mse_constant=(
                float(np.mean((constants[column] - label) ** 2)) if len(score) else np.nan
            ),
            pearson=correlation(stats.pearsonr, score, label),
            spearman=correlation(stats.spearmanr, score, label),
            pair_accuracy=agreed / pairs if pairs else np.nan,
            pairs=pairs,
        )
    return table


def correlation(
    method: Callable[..., Any], score: Float[np.ndarray, "N"], label: Float[np.ndarray, "N"]
) -> float:
    """By a method of `scipy.stats`; NaN where it is not defined."""
    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(label) == 0:
        return np.nan
    return float(method(score, label).statistic)


def pair_agreement(
    score: Float[np.ndarray, "N"], label: Float[np.ndarray, "N"], groups: Int[np.ndarray, "N"]
) -> tuple[float, int]:
    """Pairs of one group with different labels: how many are ordered alike, and how many."""
    agreed, pairs = 0.0, 0
    order_by_group = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order_by_group])) + 1
    for members in np.split(order_by_group, bounds):
        first, second = np.triu_indices(len(members), k=1)
        order = np.sign(label[members][first] - label[members][second])
        found = np.sign(score[members][first] - score[members][second])
        decided = order != 0
        pairs += int(decided.sum())
        agreed += float(np.sum(np.where(found == 0, 0.5, found == order)[decided]))
    return agreed, pairs


def mean_ratings(labels: Float[np.ndarray, "N A"]) -> Float[np.ndarray, "A"]:
    """The mean of each attribute's ratings; NaN where there is none."""
    present = ~np.isnan(labels)
    sums = np.where(present, labels, 0.0).sum(axis=0, dtype=np.float64)
    counts = present.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


# ---- preference pairs ---------------------------------------------------------------------------

_BINS = 10  # of the calibration error
_TEMPERATURES = (1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class PairMetrics:
    """A reward on held-out preference pairs; NaN where something is not defined.

    Attributes:
      attribute: the reward's name.
      pairs: how many have a preference.
      accuracy: share of them whose chosen response has the higher reward; equal rewards count one
        half.
      low: of accuracy's 95 % interval (Wilson's, as if pairs were independent).
      high: of the same.
      mean_margin: of the chosen response's reward over the other's.
      calibration_error: expected calibration error of sigmoid(margin) (Guo et al., 2017): ten bins
        of the probability of the response with the higher reward, from 1/2 to 1.
      temperature: the T for which sigmoid(margin / T) has the lowest cross-entropy on these pairs;
        NaN where there is none, because all pairs are right or the mean margin is not positive.
      length_correlation: Pearson's, of reward and tokens, over all responses.
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
    """What preference pairs say of a reward, in float64.

    Args:
      attribute: the reward's name.
      chosen: rewards of the chosen responses.
      rejected: rewards of the others.
      strengths: of the preferences; 0 in a tie, which only counts for the correlation with length,
        NaN where nobody said.
      lengths: tokens of the chosen and of the other sample.
    """
    rewards = np.stack([chosen, rejected], axis=1).astype(np.float64)
    decided = strengths != 0
    margins, strengths = (rewards[:, 0] - rewards[:, 1])[decided], strengths[decided]
    right = (1 + np.sign(margins)) / 2
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
        length_correlation=correlation(stats.pearsonr, rewards.ravel(), lengths.ravel()),
        by_strength={
            f"{strength:g}": (
                float(right[strengths == strength].mean()),
                int((strengths == strength).sum()),
            )
            for strength in known.tolist()
        },
    )


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Of a share: Wilson (1927), with a normal quantile of 95 %; NaN without any count."""
    if not count:
        return np.nan, np.nan
    share = successes / count
    centre = share + z**2 / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return float((centre - spread) / scale), float((centre + spread) / scale)


def calibration_error(margins: Float[np.ndarray, "P"]) -> float:
    """Mean over pairs of |accuracy - confidence| in their bin; see `PairMetrics`."""
    if not len(margins):
        return np.nan
    confidence = special.expit(np.abs(margins))
    right = (1 + np.sign(margins)) / 2
    bins = np.minimum((2 * _BINS * (confidence - 0.5)).astype(int), _BINS - 1)
    sums = [np.abs((right - confidence)[bins == i].sum()) for i in range(_BINS)]
    return float(np.sum(sums) / len(margins))


def fit_temperature(margins: Float[np.ndarray, "P"]) -> float:
    """The T of the lowest mean of -log sigmoid(margin / T), a convex function of 1/T."""
    if not len(margins) or not (margins < 0).any() or margins.sum() <= 0:
        return np.nan
    found = optimize.minimize_scalar(
        lambda log: np.logaddexp(0.0, -margins * np.exp(-log)).mean(),
        bounds=np.log(_TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))
