"""How sure a score is: bootstrap intervals, and a test of the difference of two models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float

from rmjax.evaluation.scoring_rules import Credits, weighted_mean

DRAWS = 2000
_PERCENTILES = (2.5, 97.5)


def bootstrap_scores(credits: Credits, seed: Sequence[int]) -> Float[np.ndarray, "B"]:
    """Scores of a subset whose units are drawn again, with replacement (Efron, 1979).

    The same seed draws the same units, so that differences between models are paired.
    """
    count = len(credits.table)
    if not count:
        return np.full(DRAWS, np.nan)
    random = np.random.default_rng(list(seed))
    scores = []
    for start in range(0, DRAWS, 100):  # a few megabytes at a time
        drawn = random.integers(0, count, (min(100, DRAWS - start), count))
        scores.append(weighted_mean(credits.table[drawn], credits.weights))
    return np.concatenate(scores)


def percentile_interval(drawn: Float[np.ndarray, "B"]) -> tuple[float, float]:
    """The 95 % interval, by percentiles of the draws in which the score is defined."""
    if np.isnan(drawn).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(drawn, _PERCENTILES)
    return float(low), float(high)


def mean_of_prompts(values: Float[np.ndarray, "P"]) -> dict[str, Any]:
    """The mean over the prompts that have a value, with its 95 % interval (bootstrap over prompts).

    Returns:
      `mean`, `low` and `high`, None without a value, and `prompts`, how many have one.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "prompts": 0}
    units = [[number] for number in range(len(known))]
    credits = Credits(("value",), (1.0,), known[:, None], units)  # pyright: ignore
    low, high = percentile_interval(bootstrap_scores(credits, seed=[0]))
    return {"mean": float(known.mean()), "low": low, "high": high, "prompts": len(known)}


def sign_test(first: Float[np.ndarray, "U"], second: Float[np.ndarray, "U"]) -> dict[str, float]:
    """Exact two-sided test on the units where the models' credits differ (McNemar, 1947).

    Returns:
      `wins` of the first model, its `losses`, and `p`, which is 1 if no unit differs.
    """
    wins, losses = int((first > second).sum()), int((first < second).sum())
    p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {"wins": wins, "losses": losses, "p": float(p)}
