"""What values say beside the score: length, calibration, distributions, mistakes, ratings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax.evaluation.metrics import attribute_metrics
from rmjax.evaluation.scoring_rules import ordered
from rmjax.evaluation.statistics import (
    Comparisons,
    best_of_n,
    by_length,
    calibration,
    correlation,
)
from rmjax.evaluation.tallies import Judged

_MISTAKES = 12
_LONGEST_TEXT = 6000  # characters of a text in the report; more are counted

Values = Sequence[np.ndarray]


def comparisons_of(judged: Judged, values: Values) -> dict[str, Any]:
    """Every two responses to a prompt of which one is better: what values make of them."""
    found = compare(judged, values)
    lengths = [np.asarray([len(text) for text in item.responses]) for item in judged.items]
    return {
        "comparisons": len(found.margins),
        "accuracy": float(found.credits.mean()) if len(found.credits) else None,
        "length": by_length(found, values, lengths),
        "calibration": calibration(found.margins),
        "strengths": _by_strength(judged, values),
        "best_of_n": _curves(judged, values),
    }


def compare(judged: Judged, values: Values) -> Comparisons:
    """The comparisons themselves."""
    margins, longer = [], []
    for item, value in zip(judged.items, values):
        better, worse = ordered(item)
        length = np.asarray([len(text) for text in item.responses])
        margins.append(value[better] - value[worse])
        longer.append(length[better] - length[worse])
    return Comparisons(np.concatenate(margins), np.concatenate(longer))


def _by_strength(judged: Judged, values: Values) -> dict[str, dict[str, float]]:
    """Accuracy of pairs by how strong people's preference is, where they said."""
    known: dict[float, list[float]] = {}
    for item, value in zip(judged.items, values):
        if item.strength == item.strength:
            known.setdefault(item.strength, []).append((1 + np.sign(value[0] - value[1])) / 2)
    return {
        f"{strength:g}": {"pairs": len(right), "accuracy": float(np.mean(right))}
        for strength, right in sorted(known.items())
    }


def _curves(judged: Judged, values: Values) -> dict[str, list[dict[str, float]]]:
    """Best of n, where prompts have more than two responses: by rating, or of what is good."""
    golds: dict[str, list[np.ndarray]] = {"good": [np.asarray(i.gold) for i in judged.items]}
    if judged.data.gold:
        names = dict.fromkeys(n for item in judged.items for r in item.ratings for n in r)
        golds = {
            name: [np.asarray([r.get(name, np.nan) for r in item.ratings]) for item in judged.items]
            for name in names
        }
    found = {}
    for name, gold in golds.items():
        whole = [i for i, g in enumerate(gold) if len(g) > 1 and not np.isnan(g).any()]
        curve = best_of_n([values[i] for i in whole], [gold[i] for i in whole])
        if len(curve) > 2:
            found[name] = curve
    return found


# ---- mistakes -----------------------------------------------------------------------------------


def mistakes(judged: Judged, values: Values) -> list[dict[str, Any]]:
    """The items whose responses the values order wrong by most, with their text."""
    worst = []
    for number, (item, value) in enumerate(zip(judged.items, values)):
        better, worse = ordered(item)
        if len(better):
            gaps = value[better] - value[worse]
            at = int(np.argmin(gaps))
            worst.append((float(gaps[at]), number, int(better[at]), int(worse[at])))
    return [
        _mistake(judged, number, margin, values[number], good, bad)
        for margin, number, good, bad in sorted(worst)[:_MISTAKES]
        if margin < 0
    ]


def _mistake(
    judged: Judged, number: int, margin: float, value: np.ndarray, good: int, bad: int
) -> dict[str, Any]:
    item, scores = judged.items[number], judged.scores[number].scores

    def side(at: int) -> dict[str, Any]:
        return {
            "text": _shortened(item.responses[at]),
            "value": float(value[at]),
            "gold": None if np.isnan(item.gold[at]) else item.gold[at],
            "attributes": dict(zip(judged.attributes, map(float, scores[at]))),
        }

    return {
        "id": item.id,
        "subset": item.subset,
        "margin": margin,
        "prompt": [{"role": m["role"], "content": _shortened(m["content"])} for m in item.prompt],
        "better": side(good),
        "worse": side(bad),
    }


def _shortened(text: str) -> str:
    """A text's beginning, and how much more there is."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]} [... {len(text) - _LONGEST_TEXT} more characters]"


# ---- attributes ---------------------------------------------------------------------------------


def attributes_of(judged: Judged) -> dict[str, Any]:
    """Correlations of the attributes with each other and with people's ratings.

    Where an attribute and a rating have the same name there are errors, too, beside those of the
    ratings' own mean.
    """
    scores = np.concatenate([s.scores for s in judged.scores])
    found: dict[str, Any] = {
        "names": list(judged.attributes),
        "correlations": [[correlation(x, y) for y in scores.T] for x in scores.T],
    }
    names = list(dict.fromkeys(n for item in judged.items for r in item.ratings for n in r))
    if not names:
        return found
    labels = np.asarray(
        [[r.get(name, np.nan) for name in names] for item in judged.items for r in item.ratings]
    )
    there = ~np.isnan(labels)
    found["ratings"] = {
        "names": names,
        "correlations": [
            [correlation(x[w], y[w]) for y, w in zip(labels.T, there.T)] for x in scores.T
        ],
    }
    both = [name for name in judged.attributes if name in names]
    if both:
        own = labels[:, [names.index(name) for name in both]]
        own_scores = scores[:, [judged.attributes.index(name) for name in both]]
        groups = np.repeat(np.arange(len(judged.items)), [len(i.gold) for i in judged.items])
        table = attribute_metrics(both, own_scores, own, groups, np.nanmean(own, axis=0))
        found["agreement"] = {
            name: {k: None if v != v else v for k, v in dataclasses.asdict(row).items()}
            for name, row in table.items()
        }
    return found
