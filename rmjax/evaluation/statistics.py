"""How sure a figure is, and what else values say: length, calibration, best of n."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats

from rmjax.evaluation import metrics
from rmjax.evaluation.scoring_rules import Credits, weighted_mean

DRAWS = 2000  # of the bootstrap
_PERCENTILES = (2.5, 97.5)
_BINS = 10


def draws(credits: Credits, seed: Sequence[int]) -> Float[np.ndarray, "B"]:
    """Scores of a subset whose units were drawn again, with replacement (Efron, 1979).

    The same seed draws the same units, so that differences between models are paired.
    """
    count = len(credits.table)
    if not count:
        return np.full(DRAWS, np.nan)
    random = np.random.default_rng(list(seed))
    found = []
    for start in range(0, DRAWS, 100):  # a few megabytes at a time
        picked = random.integers(0, count, (min(100, DRAWS - start), count))
        found.append(weighted_mean(credits.table[picked], credits.weights))
    return np.concatenate(found)


def interval(drawn: Float[np.ndarray, "B"]) -> tuple[float, float]:
    """95 %, by percentiles of the bootstrap."""
    low, high = np.percentile(drawn, _PERCENTILES)
    return float(low), float(high)


def sign_test(first: Float[np.ndarray, "U"], second: Float[np.ndarray, "U"]) -> dict[str, float]:
    """Units on which one model earns more than the other: exact, two-sided (McNemar, 1947).

    Returns:
      `wins` of the first, `losses`, and `p`, 1 where they do not differ at all.
    """
    wins, losses = int((first > second).sum()), int((first < second).sum())
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {"wins": wins, "losses": losses, "p": float(p)}


# ---- comparisons: every good response against every bad one -------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Good against bad responses to the same prompt.

    Attributes:
      margins: value of the good one less that of the bad one.
      longer: characters of the good one less those of the bad one.
    """

    margins: Float[np.ndarray, "P"]
    longer: Int[np.ndarray, "P"]

    @property
    def credits(self) -> Float[np.ndarray, "P"]:
        """1 where the good one has the higher value, one half where they are equal."""
        return (1 + np.sign(self.margins)) / 2


def by_length(found: Comparisons, values: Sequence[np.ndarray], lengths: Sequence[np.ndarray]):
    """What length has to do with it, as a mapping for reports.

    `balanced` is the mean of the accuracies where the good response is the shorter and the longer
    one, so that a preference for length gets one half. `correlation` is Pearson's, of values and
    characters, each less its mean over the prompt's responses.
    """
    credits = found.credits
    parts = {
        name: {"pairs": int(where.sum()), "accuracy": _mean(credits[where])}
        for name, where in {
            "good is shorter": found.longer < 0,
            "good is longer": found.longer > 0,
            "equally long": found.longer == 0,
        }.items()
    }
    sides = [parts["good is shorter"]["accuracy"], parts["good is longer"]["accuracy"]]
    value = np.concatenate([v - v.mean() for v in values])
    length = np.concatenate([n - n.mean() for n in lengths])
    return {
        "correlation": correlation(value, length),
        "parts": parts,
        "balanced": _number(None if None in sides else sum(sides) / 2),
        "bins": _length_bins(found),
    }


def _length_bins(found: Comparisons) -> list[dict[str, float | None]]:
    """Accuracy by tenths of the comparisons, from the shortest to the longest good response."""
    order = np.argsort(found.longer, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return [
        {
            "from": int(found.longer[part[0]]),
            "to": int(found.longer[part[-1]]),
            "pairs": len(part),
            "accuracy": _mean(found.credits[part]),
        }
        for part in parts
    ]


def calibration(margins: Float[np.ndarray, "P"]) -> dict[str, Any]:
    """Of sigmoid(margin) as a probability, as a mapping for reports; see `metrics.PairMetrics`."""
    confidence = special.expit(np.abs(margins))
    right = (1 + np.sign(margins)) / 2
    place = np.minimum((2 * _BINS * (confidence - 0.5)).astype(int), _BINS - 1)
    bins = [
        {
            "confidence": _mean(confidence[place == i]),
            "accuracy": _mean(right[place == i]),
            "pairs": int((place == i).sum()),
        }
        for i in range(_BINS)
    ]
    return {
        "error": _number(metrics.calibration_error(margins)),
        "temperature": _number(metrics.fit_temperature(margins)),
        "bins": bins,
    }


# ---- best of n ----------------------------------------------------------------------------------


def best_of_n(
    values: Sequence[Float[np.ndarray, "n"]], gold: Sequence[Float[np.ndarray, "n"]]
) -> list[dict[str, float]]:
    """What the response with the highest value of n is worth, on average.

    Exact over all choices of n of a prompt's N responses: the one at rank r from the bottom is the
    best of C(r - 1, n - 1) of C(N, n). Responses with equal values share what they are worth. Only
    prompts with at least as many responses as most have take part in every n.

    Args:
      values: by prompt.
      gold: what each response is worth, by prompt.

    Returns:
      For each n from 1: that of the values' choice, of the best possible one, and the prompts.
    """
    sizes = [len(value) for value in values]
    most = stats.mode(sizes).mode if sizes else 0
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


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None where it is not defined."""
    return _number(metrics.correlation(stats.pearsonr, x, y))


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None


def _number(x: float | None) -> float | None:
    """For JSON, which has no NaN."""
    return None if x is None or not math.isfinite(x) else float(x)
