"""All results of one benchmark, in JSON's types. docs/evaluate.md describes the fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rmjax.data.messages import message_text
from rmjax.evaluation.benchmark_metrics import (
    TOO_LONG,
    ScoredBenchmark,
    benchmark_metrics,
    gaps,
    score_record,
)
from rmjax.evaluation.benchmarks import RULE_DESCRIPTIONS
from rmjax.evaluation.comparisons import Comparisons, best_of_n_curve, by_length, calibration
from rmjax.evaluation.fit_weights import FittedWeights
from rmjax.evaluation.metrics import attribute_metrics, correlation, number_or_none, pair_credits
from rmjax.evaluation.scoring_rules import Values, ordered_pairs
from rmjax.models.rewards.aggregation import FITTED_ON, Rule, ScalarRule

_MISTAKES = 12
_LONGEST_TEXT = 6000  # characters of a text in the report


def benchmark_results(
    scored: ScoredBenchmark,
    rule: Rule,
    rules: Mapping[str, Rule],
    fitted: FittedWeights | None = None,
) -> dict[str, Any]:
    """Computes all results of one benchmark.

    Args:
      scored: items and scores.
      rule: how scores become the value that decides.
      rules: all rules that are compared, by name.
      fitted: fitted weights, to warn of items that they were fitted on.
    """
    data = scored.data
    head = {
        "name": data.label,
        "benchmark": data.benchmark.name,
        "title": data.benchmark.title if data.label == data.benchmark.name else data.label,
        "source": data.source,
        "fingerprint": data.key,
        "items": len(scored.items),
        "responses": sum(len(item.responses) for item in scored.items),
        "cut": scored.cut - scored.dropped[TOO_LONG],
        "dropped": dict(data.dropped + scored.dropped),
        "notes": list(data.notes),
        "scoring": _scoring(scored),
        "gold": data.gold or None,
        "warnings": _warnings(scored, rules, fitted),
    }
    if not scored.items:
        return head | {"complete": False, "gaps": ["no item is left"]}
    metrics, values = benchmark_metrics(scored, rule), scored.values(rule)
    missing, own = gaps(scored, metrics), score_record(metrics)
    others = {
        name: own if other is rule else score_record(benchmark_metrics(scored, other))
        for name, other in rules.items()
    }
    return (
        head
        | {"complete": not missing, "gaps": missing}
        | own
        | {"rules": {name: _brief(rules[name], scores) for name, scores in others.items()}}
        | _comparisons(scored, values)
        | {"attributes": _attributes(scored), "mistakes": _mistakes(scored, values)}
    )


def _scoring(scored: ScoredBenchmark) -> str:
    """The scoring rule in words, with how ties count."""
    benchmark = scored.data.benchmark
    ties = "wrong" if benchmark.ties == 0 else "counted one half"
    text = RULE_DESCRIPTIONS[benchmark.rule].format(ties=ties, gold=scored.data.gold)
    others = {s.name: s.rule for section in benchmark.sections for s in section.subsets if s.rule}
    return "; ".join(
        [text, *(f"{name}: {RULE_DESCRIPTIONS[other]}" for name, other in others.items())]
    )


def _warnings(
    scored: ScoredBenchmark, rules: Mapping[str, Rule], fitted: FittedWeights | None
) -> list[str]:
    texts = [
        f"the weights {name!r} were fitted on this very benchmark by their authors: their score "
        "here is too high"
        for name in rules
        if FITTED_ON.get(name) == scored.data.benchmark.name
    ]
    if scored.items and not any(len(ordered_pairs(item)[0]) for item in scored.items):
        texts.append(
            "no prompt has two responses of which one is better, so the score is not defined"
        )
    seen = fitted.seen(scored.items) if fitted else 0
    if fitted and seen:
        texts.append(
            f"the fitted weights were fitted on the prompts of {seen} of these "
            f"{len(scored.items)} items ({fitted.source}): their score here is too high"
        )
    return texts


def weights_of(rule: Rule) -> dict[str, float]:
    """The weights by attribute; none if the rule is not a weighted sum."""
    return dict(rule.weights) if isinstance(rule, ScalarRule) else {}


def _brief(rule: Rule, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "weights": weights_of(rule),
        **scores["overall"],
        "sections": {section["name"]: section["score"] for section in scores["sections"]},
    }


# ---- comparisons --------------------------------------------------------------------------------


def _comparisons(scored: ScoredBenchmark, values: Values) -> dict[str, Any]:
    """How the values order every two responses to a prompt of which one is better."""
    comparisons = Comparisons.of(scored.items, values)
    credits = comparisons.credits
    lengths = [np.asarray([len(text) for text in item.responses]) for item in scored.items]
    return {
        "comparisons": len(credits),
        "accuracy": float(credits.mean()) if len(credits) else None,
        "length": by_length(comparisons, values, lengths),
        "calibration": calibration(comparisons.margins),
        "strengths": _by_strength(scored, values),
        "best_of_n": _curves(scored, values),
    }


def _by_strength(scored: ScoredBenchmark, values: Values) -> dict[str, dict[str, float]]:
    """Accuracy of pairs by the strength of people's preference, where it is known."""
    margins: dict[float, list[float]] = {}
    for item, value in zip(scored.items, values):
        if item.strength == item.strength:  # not NaN
            margins.setdefault(item.strength, []).append(value[0] - value[1])
    return {
        f"{strength:g}": {"pairs": len(m), "accuracy": float(pair_credits(np.array(m)).mean())}
        for strength, m in sorted(margins.items())
    }


def _curves(scored: ScoredBenchmark, values: Values) -> dict[str, list[dict[str, float]]]:
    """Best of n by each rating, or by what is good, where prompts have more than two responses."""
    golds: dict[str, list[np.ndarray]] = {"good": [np.asarray(i.gold) for i in scored.items]}
    if scored.data.gold:
        golds = {
            name: [np.asarray([r.get(name, np.nan) for r in item.ratings]) for item in scored.items]
            for name in _rating_names(scored)
        }
    curves = {}
    for name, gold in golds.items():
        whole = [i for i, g in enumerate(gold) if len(g) > 1 and not np.isnan(g).any()]
        curve = best_of_n_curve([values[i] for i in whole], [gold[i] for i in whole])
        if len(curve) > 2:
            curves[name] = curve
    return curves


# ---- mistakes -----------------------------------------------------------------------------------


def _mistakes(scored: ScoredBenchmark, values: Values) -> list[dict[str, Any]]:
    """The items with the most negative margins, worst first, with their texts."""
    worst = []
    for number, (item, value) in enumerate(zip(scored.items, values)):
        better, worse = ordered_pairs(item)
        if len(better):
            gaps = value[better] - value[worse]
            at = int(np.argmin(gaps))
            worst.append((float(gaps[at]), number, int(better[at]), int(worse[at])))
    return [
        _mistake(scored, number, margin, values[number], good, bad)
        for margin, number, good, bad in sorted(worst)[:_MISTAKES]
        if margin < 0
    ]


def _mistake(
    scored: ScoredBenchmark, number: int, margin: float, value: np.ndarray, good: int, bad: int
) -> dict[str, Any]:
    item, scores = scored.items[number], scored.scores[number].scores

    def side(at: int) -> dict[str, Any]:
        return {
            "text": _shortened(item.responses[at]),
            "value": float(value[at]),
            "gold": None if np.isnan(item.gold[at]) else item.gold[at],
            "attributes": dict(zip(scored.attributes, map(float, scores[at]))),
        }

    return {
        "id": item.id,
        "subset": item.subset,
        "margin": margin,
        "prompt": [
            {"role": m["role"], "content": _shortened(message_text(m))} for m in item.prompt
        ],
        "better": side(good),
        "worse": side(bad),
    }


def _shortened(text: str) -> str:
    """The beginning of a text, and how much more there is."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]} [... {len(text) - _LONGEST_TEXT} more characters]"


# ---- attributes ---------------------------------------------------------------------------------


def _attributes(scored: ScoredBenchmark) -> dict[str, Any]:
    """Correlations of the attributes with each other and with people's ratings.

    An attribute with the name of a rating also has all of `AttributeMetrics`, where the constant is
    the mean of these ratings.
    """
    scores = np.concatenate([s.scores for s in scored.scores])
    results: dict[str, Any] = {
        "names": list(scored.attributes),
        "correlations": _correlations(scores, scores),
    }
    names = _rating_names(scored)
    if not names:
        return results
    labels = np.asarray(
        [[r.get(name, np.nan) for name in names] for item in scored.items for r in item.ratings]
    )
    results["ratings"] = {"names": names, "correlations": _correlations(scores, labels)}
    both = [name for name in scored.attributes if name in names]
    if both:
        own = labels[:, [names.index(name) for name in both]]
        own_scores = scores[:, [scored.attributes.index(name) for name in both]]
        prompt_ids = np.repeat(np.arange(len(scored.items)), [len(i.gold) for i in scored.items])
        table = attribute_metrics(both, own_scores, own, prompt_ids, np.nanmean(own, axis=0))
        results["agreement"] = {
            name: {k: None if v != v else v for k, v in dataclasses.asdict(row).items()}
            for name, row in table.items()
        }
    return results


def _rating_names(scored: ScoredBenchmark) -> list[str]:
    return list(dict.fromkeys(n for item in scored.items for r in item.ratings for n in r))


def _correlations(scores: np.ndarray, others: np.ndarray) -> list[list[float | None]]:
    """Of each column of `scores` with each column of `others`."""
    return [[number_or_none(correlation(x, y)) for y in others.T] for x in scores.T]
