"""What is said of one benchmark: one mapping in JSON's types, described in docs/evaluation.md."""

from collections.abc import Mapping
from typing import Any

from rmjax.evaluation.benchmarks import RULES
from rmjax.evaluation.details import attributes_of, comparisons_of, mistakes
from rmjax.evaluation.fit_weights import FittedWeights
from rmjax.evaluation.tallies import Judged, gaps, scores_of, tally
from rmjax.models.rewards.aggregation import FITTED_ON, Rule, ScalarRule


def result(
    judged: Judged,
    rule: Rule,
    rules: Mapping[str, Rule],
    fitted: FittedWeights | None = None,
) -> dict[str, Any]:
    """All that is said of one benchmark.

    Args:
      judged: items and scores.
      rule: the one in force.
      rules: all that are compared in one table, by name.
      fitted: weights among them that were fitted, for warnings.
    """
    data = judged.data
    dropped = dict(data.dropped)
    if judged.dropped:
        dropped["a response is too long"] = judged.dropped
    head = {
        "name": data.label,
        "benchmark": data.benchmark.name,
        "title": data.benchmark.title if data.label == data.benchmark.name else data.label,
        "source": data.source,
        "fingerprint": data.key,
        "items": len(judged.items),
        "responses": sum(len(item.responses) for item in judged.items),
        "cut": judged.cut - judged.dropped,
        "dropped": dropped,
        "scoring": _scoring(judged),
        "gold": data.gold or None,
        "warnings": _warnings(judged, rules, fitted),
    }
    if not judged.items:
        return head | {"complete": False, "gaps": ["no item is left"]}
    found, values = tally(judged, rule), judged.values(rule)
    missing, own = gaps(judged, found), scores_of(found)
    others = {name: own if r is rule else scores_of(tally(judged, r)) for name, r in rules.items()}
    return (
        head
        | {"complete": not missing, "gaps": missing}
        | own
        | {"rules": {name: _brief(rules[name], scores) for name, scores in others.items()}}
        | comparisons_of(judged, values)
        | {"attributes": attributes_of(judged), "mistakes": mistakes(judged, values)}
    )


def _scoring(judged: Judged) -> str:
    """The rule in words, with how ties count."""
    benchmark = judged.data.benchmark
    ties = "wrong" if benchmark.ties == 0 else "counted one half"
    text = RULES[benchmark.rule].format(ties=ties, gold=judged.data.gold)
    others = {s.name: s.rule for section in benchmark.sections for s in section.subsets if s.rule}
    return "; ".join([text, *(f"{name}: {RULES[other]}" for name, other in others.items())])


def _warnings(judged: Judged, rules: Mapping[str, Rule], fitted: FittedWeights | None) -> list[str]:
    said = [
        f"the weights {name!r} were fitted on this very benchmark by their authors: their score "
        "here is too high"
        for name in rules
        if FITTED_ON.get(name) == judged.data.benchmark.name
    ]
    seen = fitted.seen(judged.items) if fitted else 0
    if fitted and seen:
        said.append(
            f"the fitted weights were fitted on the prompts of {seen} of these "
            f"{len(judged.items)} items ({fitted.source}): their score here is too high"
        )
    return said


def weights_of(rule: Rule) -> dict[str, float]:
    """By attribute; none of a rule that is no weighted sum."""
    return dict(rule.weights) if isinstance(rule, ScalarRule) else {}


def _brief(rule: Rule, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "weights": weights_of(rule),
        **scores["overall"],
        "sections": {section["name"]: section["score"] for section in scores["sections"]},
    }
