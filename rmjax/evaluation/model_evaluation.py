"""The evaluation of a model on benchmarks, alone or against another model."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rmjax.errors import UserError, write_errors
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmark_metrics import ScoredBenchmark, model_comparison
from rmjax.evaluation.benchmark_results import benchmark_results
from rmjax.evaluation.fit_weights import FittedWeights, fit_weights, write_weights
from rmjax.evaluation.model_scores import ModelScores, ScoringSettings, score_model
from rmjax.models.rewards.aggregation import PUBLISHED, Rule, ScalarRule, scalar_rule
from rmjax.runtime.files import replace_file


class ModelEvaluation(NamedTuple):
    """A model on several benchmarks.

    Attributes:
      scores: the model's scores, and their rule.
      fitted: weights that were fitted, now or before; None without any.
      benchmarks: the items of each benchmark that count, with their scores.
      results: what `benchmark_results` returns for each of them.
      against: the name of the other model; empty without one.
      comparisons: what `model_comparison` returns, by the benchmark's label.
    """

    scores: ModelScores
    fitted: FittedWeights | None
    benchmarks: list[ScoredBenchmark]
    results: list[dict[str, Any]]
    against: str
    comparisons: dict[str, dict[str, Any]]


def evaluate_model(
    model: str,
    data: Sequence[BenchmarkData],
    out: Path,
    *,
    settings: ScoringSettings,
    value: str | Mapping[str, float] | None = None,
    known: FittedWeights | None = None,
    against: str = "",
    fit: BenchmarkData | None = None,
) -> ModelEvaluation:
    """Scores benchmarks with a model and computes all results.

    Args:
      model: see `score_model`.
      data: the benchmarks.
      out: directory for the scores and for `weights.json`, the fitted weights.
      settings: of the computation.
      value: a scalar rule; None for the model's own.
      known: if `value` comes from a file, what its weights were fitted on.
      against: another model; empty for none.
      fit: pairs to fit weights of the attributes on; None for none.

    Raises:
      UserError: a model or an option is bad.
    """
    scores = score_model(model, [*data, fit] if fit else data, settings, out, value)
    if fit and not isinstance(scores.rule, ScalarRule):
        raise UserError(f"--fit={fit.source}: the model's value is no weighted sum of attributes")
    parts = _scored_benchmarks(scores, [*data, fit] if fit else data, settings)
    fitted = fit_weights(parts.pop()) if fit else known
    if fit and fitted:
        write_weights(out / "weights.json", fitted)
    rules = all_rules(scores, fitted if fit else None)
    results = [benchmark_results(part, scores.rule, rules, fitted) for part in parts]
    comparisons = {}
    if against:
        own: dict[str, Any] = {"chat_template": "", "head": None, "suffix_turn": ""}
        other = score_model(against, data, dataclasses.replace(settings, **own), out)
        for mine, theirs in zip(parts, _scored_benchmarks(other, data, settings)):
            difference = model_comparison(mine, scores.rule, theirs, other.rule)
            comparisons[mine.data.label] = difference
    return ModelEvaluation(scores, fitted, parts, results, against, comparisons)


def all_rules(scores: ModelScores, fitted: FittedWeights | None) -> dict[str, Rule]:
    """All rules that the scores can be read by, by name; the model's own comes first."""
    rules: dict[str, Rule] = {scores.rule.name: scores.rule}
    if not isinstance(scores.rule, ScalarRule):  # a single number means nothing by itself
        return rules
    for name in (*scores.attributes, *PUBLISHED):
        weights = PUBLISHED.get(name, {})
        if name in scores.attributes or set(weights) <= set(scores.attributes):
            rules.setdefault(name, scalar_rule(name, scores.attributes))
    if fitted:
        rules["fitted"] = scalar_rule(fitted.weights, scores.attributes)._replace(name="fitted")
    return rules


def _scored_benchmarks(
    scores: ModelScores, data: Sequence[BenchmarkData], settings: ScoringSettings
) -> list[ScoredBenchmark]:
    return [
        ScoredBenchmark.of(part, scores.attributes, items, settings.over_long)
        for part, items in zip(data, scores.items)
    ]


def write_samples(path: Path, benchmarks: Sequence[ScoredBenchmark], rule: Rule) -> None:
    """Writes a line for each item, those that do not count too: what `read_scores` reads."""
    lines = []
    for part in benchmarks:
        for item, scores in zip(part.data.items, part.everything):
            row = {
                "benchmark": part.data.label,
                "subset": item.subset,
                "id": item.id,
                "scores": [dict(zip(part.attributes, map(float, s))) for s in scores.scores],
                "value": np.nan_to_num(rule.values(scores.scores)).tolist(),
                "good": item.good,
                "tokens": scores.tokens.tolist(),
                "cut": scores.cut.tolist(),
                "keys": list(scores.keys),
            }
            lines.append(json.dumps(row, allow_nan=False) + "\n")
    with write_errors(str(path)):
        replace_file(path, "".join(lines).encode())
