"""Responses to one prompt compared by their values: by length, as probabilities, best of n."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int

from rmjax.evaluation.items import Item
from rmjax.evaluation.metrics import (
    CALIBRATION_BINS,
    calibration_bins,
    calibration_error,
    correlation,
    fit_temperature,
    number_or_none,
    pair_credits,
)
from rmjax.evaluation.scoring_rules import Values, ordered_pairs

_LENGTH_BINS = 10


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """A better and a worse response to the same prompt, for every two such responses.

    Attributes:
      margins: value of the better one minus that of the worse.
      longer: characters of the better one minus those of the worse.
    """

    margins: Float[np.ndarray, "P"]
    longer: Int[np.ndarray, "P"]

    @property
    def credits(self) -> Float[np.ndarray, "P"]:
        """See `pair_credits`."""
        return pair_credits(self.margins)

    @classmethod
    def of(cls, items: Sequence[Item], values: Values) -> "Comparisons":
        """All comparisons of these items."""
        margins, longer = [], []
        for item, value in zip(items, values):
            better, worse = ordered_pairs(item)
            length = np.asarray([len(text) for text in item.responses])
            margins.append(value[better] - value[worse])
            longer.append(length[better] - length[worse])
        return cls(np.concatenate(margins), np.concatenate(longer))


def by_length(
    comparisons: Comparisons, values: Sequence[np.ndarray], lengths: Sequence[np.ndarray]
) -> dict[str, Any]:
    """How the accuracy and the values depend on length, as a mapping for reports.

    `balanced` is the mean of two accuracies, where the better response is the shorter one and where
    it is the longer one; a mere preference for length gets one half. `correlation` is Pearson's, of
    values and characters, each minus its mean over the prompt's responses.
    """
    credits, longer = comparisons.credits, comparisons.longer
    parts = {
        name: {"pairs": int(where.sum()), "accuracy": _mean(credits[where])}
        for name, where in {
            "good is shorter": longer < 0,
            "good is longer": longer > 0,
            "equally long": longer == 0,
        }.items()
    }
    sides = [parts["good is shorter"]["accuracy"], parts["good is longer"]["accuracy"]]
    value = np.concatenate([v - v.mean() for v in values])
    length = np.concatenate([n - n.mean() for n in lengths])
    return {
        "correlation": number_or_none(correlation(value, length)),
        "parts": parts,
        "balanced": None if None in sides else sum(sides) / 2,
        "bins": _length_bins(comparisons),
    }


def _length_bins(comparisons: Comparisons) -> list[dict[str, float | None]]:
    """Accuracy in tenths of the comparisons, sorted by how much longer the better response is."""
    order = np.argsort(comparisons.longer, kind="stable")
    parts = [part for part in np.array_split(order, _LENGTH_BINS) if len(part)]
    return [
        {
            "from": int(comparisons.longer[part[0]]),
            "to": int(comparisons.longer[part[-1]]),
            "pairs": len(part),
            "accuracy": _mean(comparisons.credits[part]),
        }
        for part in parts
    ]


def calibration(margins: Float[np.ndarray, "P"]) -> dict[str, Any]:
    """Whether sigmoid(margin) is a probability, as a mapping for reports; see `PairMetrics`."""
    confidence, bins = calibration_bins(margins)
    credits = pair_credits(margins)
    return {
        "error": number_or_none(calibration_error(margins)),
        "temperature": number_or_none(fit_temperature(margins)),
        "bins": [
            {
                "confidence": _mean(confidence[bins == i]),
                "accuracy": _mean(credits[bins == i]),
                "pairs": int((bins == i).sum()),
            }
            for i in range(CALIBRATION_BINS)
        ],
    }


# ---- best of n ----------------------------------------------------------------------------------


def best_of_n_curve(
    values: Sequence[Float[np.ndarray, "n"]], gold: Sequence[Float[np.ndarray, "n"]]
) -> list[dict[str, float]]:
    """The mean gold of the response with the highest value of n, for each n from 1.

    Exact over all choices of n of a prompt's N responses: the one at rank r from the bottom is the
    highest in C(r - 1, n - 1) of C(N, n) choices. Responses with equal values share their gold. The
    prompts are those with at least as many responses as most prompts have, the same for every n.

    Args:
      values: of each prompt's responses.
      gold: what each response is worth, by prompt.

    Returns:
      For each n: the mean gold of the `chosen` response, its 95 % interval from `low` to `high`,
      the mean gold of the `best` one, and the number of `prompts`.
    """
    sizes = [len(value) for value in values]
    most = scipy.stats.mode(sizes).mode if sizes else 0
    kept = [i for i, size in enumerate(sizes) if size >= most]
    curve = []
    for n in range(1, int(most) + 1):
        chosen = [_expected(values[i], gold[i], n) for i in kept]
        best = [_expected(gold[i], gold[i], n) for i in kept]
        spread = np.std(chosen, ddof=1) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
        curve.append(
            {
                "n": n,
                "chosen": float(np.mean(chosen)),
                "low": float(np.mean(chosen) - 1.96 * spread),
                "high": float(np.mean(chosen) + 1.96 * spread),
                "best": float(np.mean(best)),
                "prompts": len(kept),
            }
        )
    return curve


def _expected(value: np.ndarray, gold: np.ndarray, n: int) -> float:
    count = len(value)
    gold = gold.astype(np.float64)
    order = np.argsort(value, kind="stable")
    shared = gold[order].copy()
    for level in np.unique(value):
        tied = value[order] == level
        shared[tied] = gold[order][tied].mean()
    ways = [math.comb(rank, n - 1) for rank in range(count)]
    return float(shared @ ways) / math.comb(count, n)


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None
