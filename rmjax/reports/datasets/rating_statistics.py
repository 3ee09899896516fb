"""Statistics of rated responses, as in the HelpSteer2 paper (arXiv 2406.08673)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rmjax.data.conversation import prompt_key
from rmjax.data.row_reader import Sample
from rmjax.data.tokenizer import Tokenizer
from rmjax.evaluation.metrics import correlation, split_by_prompt
from rmjax.reports.datasets.lengths import (
    count_values,
    prompt_characters,
    response_characters,
    response_tokens,
    sample_tokens,
    summary_statistics,
    turn_counts,
)

RESPONSE_LENGTH = "response length"
_VALUES = 20  # up to so many different ratings, each is counted
_BINS = 20  # of the histogram otherwise


@dataclasses.dataclass(frozen=True)
class RatedResponses:
    """Rated responses, as arrays.

    Attributes:
      source: file or hub id.
      samples: what was read.
      attributes: names of the ratings.
      labels: the rating of each sample and attribute; NaN where it is missing.
      prompt_ids: samples with the same number answer the same prompt.
      characters: of each response.
      tokens: of each response; None without a tokenizer.
    """

    source: str
    samples: Sequence[Sample]
    attributes: tuple[str, ...]
    labels: Float[np.ndarray, "N A"]
    prompt_ids: Int[np.ndarray, "N"]
    characters: Int[np.ndarray, "N"]
    tokens: Int[np.ndarray, "N"] | None


def rated_responses(
    source: str,
    samples: Sequence[Sample],
    attributes: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> RatedResponses:
    """The samples and their arrays."""
    keys: dict[str, int] = {}
    prompt_ids = [
        keys.setdefault(prompt_key([sample.conversation]), len(keys)) for sample in samples
    ]
    return RatedResponses(
        source=source,
        samples=samples,
        attributes=tuple(attributes),
        labels=np.array([sample.labels for sample in samples], float).reshape(len(samples), -1),
        prompt_ids=np.array(prompt_ids, int),
        characters=response_characters(samples),
        tokens=response_tokens(samples, tokenizer) if tokenizer else None,
    )


def measure_ratings(ratings: RatedResponses, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The statistics of ratings, under the names of `report.json`."""
    samples = ratings.samples
    columns = dict(zip(ratings.attributes, ratings.labels.T))
    lengths = {
        "prompt_characters": summary_statistics(prompt_characters(samples)),
        "response_characters": summary_statistics(ratings.characters),
    }
    if tokenizer is not None and ratings.tokens is not None:
        lengths["response_tokens"] = summary_statistics(ratings.tokens)
        lengths["sample_tokens"] = summary_statistics(sample_tokens(samples, tokenizer))
    names = (*ratings.attributes, RESPONSE_LENGTH)
    return {
        "source": ratings.source,
        "responses": len(samples),
        "prompts": int(ratings.prompt_ids.max()) + 1,
        "responses_per_prompt": count_values(np.bincount(ratings.prompt_ids).tolist()),
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
        "siblings": {
            name: siblings(column, ratings.prompt_ids) for name, column in columns.items()
        },
    }


def _attribute(column: Float[np.ndarray, "N"]) -> dict[str, Any]:
    present = column[~np.isnan(column)]
    statistics = summary_statistics(present)
    return {
        "ratings": len(present),
        "missing": len(column) - len(present),
        **{name: statistics[name] for name in ("mean", "sd", "min", "median", "max")},
        "histogram": _histogram(present),
    }


def _histogram(values: Float[np.ndarray, "N"]) -> dict[str, Any]:
    """How often each value occurs if there are few, else counts in bins of equal width."""
    if not len(values):
        return {"values": [], "edges": None, "counts": []}
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _VALUES:
        return {"values": distinct.tolist(), "edges": None, "counts": counts.tolist()}
    counts, edges = np.histogram(values, _BINS)
    return {"values": None, "edges": edges.tolist(), "counts": counts.tolist()}


def pearson_matrix(columns: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "C C"]:
    """The correlation of every two columns, over the rows that have both; see `correlation`."""
    return np.array([[correlation(x, y) for y in columns.T] for x in columns.T])


def _length_correlation(
    column: Float[np.ndarray, "N"], ratings: RatedResponses
) -> dict[str, float]:
    lengths = {"characters": ratings.characters}
    if ratings.tokens is not None:
        lengths["tokens"] = ratings.tokens
    return {
        f"{name}_{unit}": correlation(column, length, ranks=name == "spearman")
        for unit, length in lengths.items()
        for name in ("pearson", "spearman")
    }


def siblings(column: Float[np.ndarray, "N"], prompt_ids: Int[np.ndarray, "N"]) -> dict[str, float]:
    """How much the ratings of responses to one prompt differ.

    Returns:
      prompts: how many prompts have two ratings or more; the others do not count.
      pairs: how many pairs of responses they have.
      equal: share of the pairs with equal ratings.
      mean_difference: mean absolute difference of a pair's ratings.
      within: share of the ratings' variance that is within prompts; the rest is between prompts.
    """
    present = ~np.isnan(column)
    values = column[present]
    members = [values[part] for part in split_by_prompt(prompt_ids[present]) if len(part) > 1]
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
