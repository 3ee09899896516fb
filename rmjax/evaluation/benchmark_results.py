"""All results of one benchmark, in JSON's types. docs/evaluation.md describes the fields."""

from collections.abc import Mapping
from typing import Any

from rmjax.evaluation.benchmark_metrics import (
    ScoredBenchmark,
    benchmark_metrics,
    gaps,
    score_record,
)
from rmjax.evaluation.benchmarks import RULE_DESCRIPTIONS
from rmjax.evaluation.details import attributes_of, comparisons_of, mistakes
from rmjax.evaluation.fit_weights import FittedWeights
from rmjax.models.rewards.aggregation import FITTED_ON, Rule, ScalarRule


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
    dropped = dict(data.dropped)
    if scored.dropped:
        dropped["a response is too long"] = scored.dropped
    head = {
        "name": data.label,
        "benchmark": data.benchmark.name,
        "title": data.benchmark.title if data.label == data.benchmark.name else data.label,
        "source": data.source,
        "fingerprint": data.key,
        "items": len(scored.items),
        "responses": sum(len(item.responses) for item in scored.items),
        "cut": scored.cut - scored.dropped,
        "dropped": dropped,
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
        | comparisons_of(scored, values)
        | {"attributes": attributes_of(scored), "mistakes": mistakes(scored, values)}
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
