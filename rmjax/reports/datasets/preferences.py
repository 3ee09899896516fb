"""The numbers of preference pairs, and whether they agree with ratings of the same responses."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rmjax.data.records import Sample
from rmjax.data.tokenizer import Tokenizer
from rmjax.evaluation.metrics import wilson_interval
from rmjax.reports.datasets.lengths import (
    prompt_characters,
    prompt_key,
    response_characters,
    response_tokens,
    spread,
    turn_counts,
)
from rmjax.reports.datasets.ratings import Ratings

Pair = tuple[Sample, Sample]  # the preferred response and the other one


def measure_preferences(
    source: str, pairs: Sequence[Pair], tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """All numbers of the report, under the names of its JSON."""
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    strengths = np.array([sample.strength for sample in chosen], float)
    decided = strengths != 0  # where nobody said how much, too
    a, b = response_characters(chosen), response_characters(rejected)
    lengths = {
        "prompt_characters": spread(prompt_characters(chosen)),
        "chosen_characters": spread(a[decided]),
        "rejected_characters": spread(b[decided]),
    }
    if tokenizer is not None:
        for name, samples in (("chosen", chosen), ("rejected", rejected)):
            tokens = response_tokens(samples, tokenizer)
            lengths[f"{name}_tokens"] = spread(tokens[decided])
    known = np.unique(strengths[decided & ~np.isnan(strengths)])
    return {
        "source": source,
        "pairs": len(pairs),
        "prompts": len({prompt_key(sample) for sample in chosen}),
        "decided": int(decided.sum()),
        "ties": int((~decided).sum()),
        "strengths": count_strengths(pairs),
        "turns": turn_counts(chosen),
        "lengths": lengths,
        "longer_chosen": {
            "all": longer_chosen(a, b, decided),
            "by_strength": {f"{s:g}": longer_chosen(a, b, strengths == s) for s in known},
        },
        "position": _position(chosen, decided),
        "repeats": repeats(pairs),
    }


def count_strengths(pairs: Sequence[Pair]) -> dict[str, int]:
    """Pairs of each strength: negative where response 1 is better, if it is known which was.

    Where it is not, strengths are not negative. `unknown` counts pairs of which nobody said.
    """
    signed = any(sample.place for sample, _ in pairs)
    found: collections.Counter[float] = collections.Counter()
    unknown = 0
    for sample, _ in pairs:
        if math.isnan(sample.strength):
            unknown += 1
        else:
            found[-sample.strength if signed and sample.place == 1 else sample.strength] += 1
    counts = {f"{strength + 0.0:g}": found[strength] for strength in sorted(found)}
    return counts | ({"unknown": unknown} if unknown else {})


def longer_chosen(
    chosen: Float[np.ndarray, "P"], rejected: Float[np.ndarray, "P"], which: Bool[np.ndarray, "P"]
) -> dict[str, float]:
    """Share of pairs whose chosen response is the longer one, of those with different lengths."""
    longer = int((chosen > rejected)[which].sum())
    return share(longer, int((chosen != rejected)[which].sum()))


def share(successes: int, count: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson's)."""
    low, high = wilson_interval(successes, count)
    return {
        "pairs": count,
        "share": successes / count if count else math.nan,
        "low": low,
        "high": high,
    }


def _position(chosen: Sequence[Sample], decided: Bool[np.ndarray, "P"]) -> dict[str, float] | None:
    """Share of the second response among those chosen; None if the order is not known."""
    places = np.array([sample.place for sample in chosen])[decided]
    places = places[places > 0]
    return share(int((places == 2).sum()), len(places)) if len(places) else None


def repeats(pairs: Sequence[Pair]) -> dict[str, int]:
    """Pairs that stand there more than once.

    Returns:
      repeated: rows whose prompt and two responses an earlier row has, in either order.
      contradictions: such pairs of which each response is preferred somewhere.
      identical: rows whose two responses are the same text.
    """
    winners: dict[tuple[str, frozenset[str]], set[str]] = {}
    identical = 0
    for better, other in pairs:
        key = prompt_key(better), frozenset((better.response, other.response))
        won = winners.setdefault(key, set())
        if better.response == other.response:
            identical += 1
        elif better.strength != 0:
            won.add(better.response)
    return {
        "repeated": len(pairs) - len(winners),
        "contradictions": sum(len(won) > 1 for won in winners.values()),
        "identical": identical,
    }


# ---- with ratings -------------------------------------------------------------------------------


def measure_agreement(pairs: Sequence[Pair], ratings: Ratings) -> dict[str, Any]:
    """Whether the preferred response has the higher rating, for pairs whose responses are rated.

    Responses are found by prompt and text; of several ratings of one, their mean counts.
    """
    rated: dict[tuple[str, str], list[int]] = {}
    for number, sample in enumerate(ratings.samples):
        rated.setdefault((prompt_key(sample), sample.response), []).append(number)
    differences, strengths = [], []
    for better, other in pairs:
        key = prompt_key(better)
        first, second = rated.get((key, better.response)), rated.get((key, other.response))
        if first is not None and second is not None:
            differences.append(_mean(ratings.labels[first]) - _mean(ratings.labels[second]))
            strengths.append(better.strength)
    found = np.array(differences, float).reshape(-1, len(ratings.attributes))
    strength = np.array(strengths, float)
    return {
        "ratings": ratings.source,
        "pairs": len(pairs),
        "matched": len(found),
        "attributes": {
            name: _agreement(column, strength) for name, column in zip(ratings.attributes, found.T)
        },
    }


def _mean(labels: Float[np.ndarray, "K A"]) -> Float[np.ndarray, "A"]:
    present = ~np.isnan(labels)
    counts = present.sum(axis=0)
    sums = np.where(present, labels, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _agreement(
    differences: Float[np.ndarray, "P"], strengths: Float[np.ndarray, "P"]
) -> dict[str, Any]:
    decided = strengths != 0
    known = np.unique(strengths[decided & ~np.isnan(strengths)])
    ties = differences[~decided]
    ties = ties[~np.isnan(ties)]
    return {
        **_compare(differences[decided]),
        "by_strength": {f"{s:g}": _compare(differences[strengths == s]) for s in known},
        "ties": {
            "pairs": len(ties),
            "equal": float(np.mean(ties == 0)) if len(ties) else math.nan,
            "mean_difference": float(np.abs(ties).mean()) if len(ties) else math.nan,
        },
    }


def _compare(differences: Float[np.ndarray, "P"]) -> dict[str, float]:
    """Of rating differences, chosen minus rejected: how many agree, are equal, contradict."""
    found = differences[~np.isnan(differences)]
    agree, opposite = int((found > 0).sum()), int((found < 0).sum())
    shares = share(agree, agree + opposite)
    return {
        "pairs": len(found),
        "agree": agree,
        "equal": len(found) - agree - opposite,
        "opposite": opposite,
        "agreement": shares["share"],
        "low": shares["low"],
        "high": shares["high"],
        "mean_difference": float(found.mean()) if len(found) else math.nan,
    }
