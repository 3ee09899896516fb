"""How good scores are: per attribute, against the constant mean, and on pairs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


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
            pearson=_correlation(stats.pearsonr, score, label),
            spearman=_correlation(stats.spearmanr, score, label),
            pair_accuracy=agreed / pairs if pairs else np.nan,
            pairs=pairs,
        )
    return table


def _correlation(
    method: Callable[..., Any], score: Float[np.ndarray, "N"], label: Float[np.ndarray, "N"]
) -> float:
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


def validation_loss(scores: Float[np.ndarray, "N A"], labels: Float[np.ndarray, "N A"]) -> float:
    """Mean squared error over all labels that are present: the regression loss, in float64."""
    return float(np.nanmean((scores.astype(np.float64) - labels) ** 2))


def pair_metrics(margins: Float[np.ndarray, "P"]) -> AttributeMetrics:
    """What preference pairs say of a reward: how often the chosen response has the higher one.

    Args:
      margins: reward of the chosen response minus that of the rejected one, each pair.
    """
    accuracy = float(np.mean((1 + np.sign(margins)) / 2)) if len(margins) else np.nan
    return AttributeMetrics(0, np.nan, np.nan, np.nan, np.nan, accuracy, len(margins))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` things (at least 1) that were drawn independently.

    Wilson (1927); the ends stay within 0 and 1.
    """
    z2 = stats.norm.ppf(0.975) ** 2
    middle = share + z2 / (2 * count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    low, high = (middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count)
    return max(0.0, float(low)), min(1.0, float(high))


def bradley_terry_loss(margins: Float[np.ndarray, "P"]) -> float:
    """Mean of -log sigmoid(margin) over pairs, in float64."""
    return float(np.mean(np.logaddexp(0.0, -margins)))
