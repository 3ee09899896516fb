"""Statistics of preference pairs, and whether ratings of the same responses agree with them."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from rmjax.data.conversation import conversation_key, prompt_key
from rmjax.data.row_reader import Pair, Sample
from rmjax.data.tokenizer import Tokenizer
from rmjax.evaluation.metrics import mean_ratings, wilson_interval
from rmjax.reports.datasets.lengths import (
    prompt_characters,
    response_characters,
    response_tokens,
    summary_statistics,
    turn_counts,
)
from rmjax.reports.datasets.rating_statistics import RatedResponses


def measure_preferences(
    source: str, pairs: Sequence[Pair], tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """The statistics of pairs, under the names of `report.json`."""
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    strengths = np.array([sample.strength for sample in chosen], float)
    decided = strengths != 0  # also where the strength is unknown
    a, b = response_characters(chosen), response_characters(rejected)
    lengths = {
        "prompt_characters": summary_statistics(prompt_characters(chosen)),
        "chosen_characters": summary_statistics(a[decided]),
        "rejected_characters": summary_statistics(b[decided]),
    }
    if tokenizer is not None:
        for name, samples in (("chosen", chosen), ("rejected", rejected)):
            tokens = response_tokens(samples, tokenizer)
            lengths[f"{name}_tokens"] = summary_statistics(tokens[decided])
    known = np.unique(strengths[decided & ~np.isnan(strengths)])
    return {
        "source": source,
        "pairs": len(pairs),
        "prompts": len({prompt_key([sample.conversation for sample in pair]) for pair in pairs}),
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
    """How many pairs have each strength; `unknown` counts those whose strength is not known.

    If the data say which response came first, strengths are negative where that one is chosen.
    """
    signed = any(sample.place for sample, _ in pairs)
    known: collections.Counter[float] = collections.Counter()
    unknown = 0
    for sample, _ in pairs:
        if math.isnan(sample.strength):
            unknown += 1
        else:
            known[-sample.strength if signed and sample.place == 1 else sample.strength] += 1
    counts = {f"{strength + 0.0:g}": known[strength] for strength in sorted(known)}
    return counts | ({"unknown": unknown} if unknown else {})


def longer_chosen(
    chosen: Float[np.ndarray, "P"], rejected: Float[np.ndarray, "P"], which: Bool[np.ndarray, "P"]
) -> dict[str, float]:
    """Share of the pairs with different lengths whose chosen response is the longer one."""
    longer = int((chosen > rejected)[which].sum())
    return share_with_interval(longer, int((chosen != rejected)[which].sum()))


def share_with_interval(successes: int, count: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson's)."""
    low, high = wilson_interval(successes, count)
    return {
        "pairs": count,
        "share": successes / count if count else math.nan,
        "low": low,
        "high": high,
    }


def _position(chosen: Sequence[Sample], decided: Bool[np.ndarray, "P"]) -> dict[str, float] | None:
    """Share of pairs whose second response is chosen; None if the order is not known."""
    places = np.array([sample.place for sample in chosen])[decided]
    places = places[places > 0]
    return share_with_interval(int((places == 2).sum()), len(places)) if len(places) else None


def repeats(pairs: Sequence[Pair]) -> dict[str, int]:
    """Counts pairs that occur more than once.

    Returns:
      repeated: rows with the prompt and the two responses of an earlier row, in either order.
      contradictions: repeated pairs in which each response is preferred somewhere.
      identical: rows whose two conversations are the same.
    """
    winners: dict[frozenset[str], set[str]] = {}
    identical = 0
    for better, other in pairs:
        first, second = (conversation_key(side.conversation) for side in (better, other))
        won = winners.setdefault(frozenset((first, second)), set())
        if first == second:
            identical += 1
        elif better.strength != 0:
            won.add(first)
    return {
        "repeated": len(pairs) - len(winners),
        "contradictions": sum(len(won) > 1 for won in winners.values()),
        "identical": identical,
    }


# ---- with ratings -------------------------------------------------------------------------------


def measure_agreement(pairs: Sequence[Pair], ratings: RatedResponses) -> dict[str, Any]:
    """Whether chosen responses have the higher rating, in pairs whose responses are both rated.

    Responses are matched by their conversations; several ratings of one response are averaged.
    """
    rated: dict[str, list[int]] = {}
    for number, sample in enumerate(ratings.samples):
        rated.setdefault(conversation_key(sample.conversation), []).append(number)
    differences, strengths = [], []
    for better, other in pairs:
        first, second = (rated.get(conversation_key(s.conversation)) for s in (better, other))
        if first is not None and second is not None:
            chosen, rejected = (mean_ratings(ratings.labels[rows]) for rows in (first, second))
            differences.append(chosen - rejected)
            strengths.append(better.strength)
    table = np.array(differences, float).reshape(-1, len(ratings.attributes))
    strength = np.array(strengths, float)
    return {
        "ratings": ratings.source,
        "pairs": len(pairs),
        "matched": len(table),
        "attributes": {
            name: _agreement(column, strength) for name, column in zip(ratings.attributes, table.T)
        },
    }


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
    """How many rating differences, chosen minus rejected, are positive, zero and negative."""
    known = differences[~np.isnan(differences)]
    agree, opposite = int((known > 0).sum()), int((known < 0).sum())
    shares = share_with_interval(agree, agree + opposite)
    return {
        "pairs": len(known),
        "agree": agree,
        "equal": len(known) - agree - opposite,
        "opposite": opposite,
        "agreement": shares["share"],
        "low": shares["low"],
        "high": shares["high"],
        "mean_difference": float(known.mean()) if len(known) else math.nan,
    }
