"""The numbers of rated responses: the tables of the HelpSteer2 paper (arXiv 2406.08673)."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from rmjax.data.records import Sample
from rmjax.data.tokenizer import Tokenizer
from rmjax.reports.datasets.lengths import (
    prompt_characters,
    prompt_key,
    response_characters,
    response_tokens,
    sample_tokens,
    spread,
    tally,
    turn_counts,
)

LENGTH = "response length"
_VALUES = 20  # different ratings up to which each is counted
_BINS = 20  # else


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Rated responses.

    Attributes:
      source: file or hub id.
      samples: all of them.
      attributes: names of the ratings.
      labels: of each sample and attribute; NaN where there is none.
      groups: samples with the same number answer the same prompt.
      characters: of each response.
      tokens: of each response; None without a tokenizer.
    """

    source: str
    samples: Sequence[Sample]
    attributes: tuple[str, ...]
    labels: Float[np.ndarray, "N A"]
    groups: Int[np.ndarray, "N"]
    characters: Int[np.ndarray, "N"]
    tokens: Int[np.ndarray, "N"] | None


def make_ratings(
    source: str,
    samples: Sequence[Sample],
    attributes: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Ratings:
    """Arrays of what was read."""
    keys: dict[str, int] = {}
    groups = [keys.setdefault(prompt_key(sample), len(keys)) for sample in samples]
    return Ratings(
        source=source,
        samples=samples,
        attributes=tuple(attributes),
        labels=np.array([sample.labels for sample in samples], float).reshape(len(samples), -1),
        groups=np.array(groups, int),
        characters=response_characters(samples),
        tokens=response_tokens(samples, tokenizer) if tokenizer else None,
    )


def measure_ratings(ratings: Ratings, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """All numbers of the report, under the names of its JSON."""
    samples = ratings.samples
    columns = dict(zip(ratings.attributes, ratings.labels.T))
    lengths = {
        "prompt_characters": spread(prompt_characters(samples)),
        "response_characters": spread(ratings.characters),
    }
    if tokenizer is not None and ratings.tokens is not None:
        lengths["response_tokens"] = spread(ratings.tokens)
        lengths["sample_tokens"] = spread(sample_tokens(samples, tokenizer))
    names = (*ratings.attributes, LENGTH)
    return {
        "source": ratings.source,
        "responses": len(samples),
        "prompts": int(ratings.groups.max()) + 1,
        "responses_per_prompt": tally(np.bincount(ratings.groups).tolist()),
        "turns": turn_counts(samples),
        "lengths": lengths,
        "attributes": {name: _attribute(column) for name, column in columns.items()},
        "correlation": {
            "names": names,
            "pearson": pearson_matrix(np.column_stack([ratings.labels, ratings.characters])),
        },
        "length_correlation": {
            name: _length_correlation(column, ratings) for name, column in columns.items()
        },
        "siblings": {name: siblings(column, ratings.groups) for name, column in columns.items()},
    }


def _attribute(column: Float[np.ndarray, "N"]) -> dict[str, Any]:
    present = column[~np.isnan(column)]
    found = spread(present)
    return {
        "ratings": len(present),
        "missing": len(column) - len(present),
        **{name: found[name] for name in ("mean", "sd", "min", "median", "max")},
        "histogram": _histogram(present),
    }


def _histogram(values: Float[np.ndarray, "N"]) -> dict[str, Any]:
    """Counts of each value, if there are few, else of bins of equal width."""
    if not len(values):
        return {"values": [], "edges": None, "counts": []}
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _VALUES:
        return {"values": distinct.tolist(), "edges": None, "counts": counts.tolist()}
    counts, edges = np.histogram(values, _BINS)
    return {"values": None, "edges": edges.tolist(), "counts": counts.tolist()}


def pearson_matrix(columns: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "C C"]:
    """Correlations of each two columns over the rows that have both; NaN where not defined."""
    count = columns.shape[1]
    matrix = np.full((count, count), np.nan)
    for i, j in itertools.product(range(count), repeat=2):
        matrix[i, j] = correlation(columns[:, i], columns[:, j])
    return matrix


def correlation(
    one: Float[np.ndarray, "N"] | Int[np.ndarray, "N"],
    other: Float[np.ndarray, "N"] | Int[np.ndarray, "N"],
    ranks: bool = False,
) -> float:
    """Pearson's, or Spearman's of `ranks`, over where both are there; NaN if not defined."""
    one, other = np.asarray(one, float), np.asarray(other, float)
    present = ~np.isnan(one) & ~np.isnan(other)
    one, other = one[present], other[present]
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    method = stats.spearmanr if ranks else stats.pearsonr
    found: Any = method(one, other)
    return float(found.statistic)


def _length_correlation(column: Float[np.ndarray, "N"], ratings: Ratings) -> dict[str, float]:
    found = {
        "pearson_characters": correlation(column, ratings.characters),
        "spearman_characters": correlation(column, ratings.characters, ranks=True),
    }
    if ratings.tokens is not None:
        found["pearson_tokens"] = correlation(column, ratings.tokens)
        found["spearman_tokens"] = correlation(column, ratings.tokens, ranks=True)
    return found


def siblings(column: Float[np.ndarray, "N"], groups: Int[np.ndarray, "N"]) -> dict[str, float]:
    """How much the ratings of responses to one prompt differ.

    Returns:
      prompts: how many have two ratings or more.
      pairs: of responses to one of them.
      equal: share of the pairs that have the same rating.
      mean_difference: the mean of their absolute difference.
      within: share of the ratings' variance that is between responses to one prompt, of 1; the
        rest is between prompts. Only over prompts with two ratings or more.
    """
    present = ~np.isnan(column)
    values, groups = column[present], groups[present]
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    members = [values[part] for part in np.split(order, bounds) if len(part) > 1]
    if not members:
        empty = dict.fromkeys(("equal", "mean_difference", "within"), math.nan)
        return {"prompts": 0, "pairs": 0, **empty}
    differences = np.concatenate([_differences(part) for part in members])
    everything = np.concatenate(members)
    total = float(((everything - everything.mean()) ** 2).sum())
    within = sum(float(((part - part.mean()) ** 2).sum()) for part in members)
    return {
        "prompts": len(members),
        "pairs": len(differences),
        "equal": float(np.mean(differences == 0)),
        "mean_difference": float(differences.mean()),
        "within": within / total if total else math.nan,
    }


def _differences(values: Float[np.ndarray, "K"]) -> Float[np.ndarray, "P"]:
    first, second = np.triu_indices(len(values), k=1)
    return np.abs(values[first] - values[second])
