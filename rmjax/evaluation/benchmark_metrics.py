"""The metrics of a benchmark: scores of subsets, sections and the whole, with intervals."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.data.records import EQUAL
from rmjax.evaluation.benchmark_data import BenchmarkData
from rmjax.evaluation.benchmark_sections import Section, Subset
from rmjax.evaluation.bootstrap import bootstrap_scores, percentile_interval, sign_test
from rmjax.evaluation.items import Item
from rmjax.evaluation.metrics import number_or_none
from rmjax.evaluation.score_cache import ItemScores
from rmjax.evaluation.scoring_rules import SCORING_RULES, Credits, column_means
from rmjax.models.rewards.aggregation import Rule

TOO_LONG = "a response is too long"
SEED = 0  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class ScoredBenchmark:
    """A benchmark's items with a model's scores.

    Attributes:
      data: the benchmark.
      attributes: the columns of the scores.
      items: those that count.
      scores: of each of them.
      cut: how many of all items had a response that was too long.
      dropped: how many items, or single responses with ratings, do not count, by reason.
      everything: the scores of all items, those that do not count too.
    """

    data: BenchmarkData
    attributes: tuple[str, ...]
    items: list[Item]
    scores: list[ItemScores]
    cut: int
    dropped: Counter[str]
    everything: list[ItemScores]

    @classmethod
    def of(
        cls,
        data: BenchmarkData,
        attributes: tuple[str, ...],
        scores: Sequence[ItemScores],
        over_long: str,
    ) -> "ScoredBenchmark":
        """The items that count, of which the others are counted as training counts them.

        Args:
          data: the benchmark.
          attributes: the columns of the scores.
          scores: of each item.
          over_long: `drop` leaves out items with a response that is too long.
        """
        dropped: Counter[str] = Counter()
        items, kept = [], []
        for item, score in zip(data.items, scores):
            too_long = score.cut & (over_long == "drop")
            if data.benchmark.row_format == "ratings" and too_long.any():
                # A response by itself, as in training: the others are compared without it.
                dropped[TOO_LONG] += int(too_long.sum())
                item, score = item.without(too_long), score.without(too_long)
                too_long = score.cut & False
            if too_long.any():
                dropped[TOO_LONG] += 1
            elif data.benchmark.row_format == "pairs" and len(set(score.keys)) == 1:
                dropped[EQUAL] += 1  # two texts of which the template makes one
            elif item.conversations:
                items.append(item)
                kept.append(score)
        cut = sum(bool(s.cut.any()) for s in scores)
        return cls(data, attributes, items, kept, cut, dropped, list(scores))

    def values(self, rule: Rule) -> list[Float[np.ndarray, "n"]]:
        """The values of each item's responses; 0 for a response that none can be compared with."""
        return [np.nan_to_num(rule.values(s.scores)) for s in self.scores]


@dataclasses.dataclass(frozen=True)
class BenchmarkMetrics:
    """The credits of a benchmark by subset, and how they make up its scores.

    Attributes:
      sections: in the order of the report.
      credits: of each subset that has items.
      overall: `sections` or `items`; see `benchmarks.Benchmark`.
    """

    sections: tuple[Section, ...]
    credits: dict[str, Credits]
    overall: str

    def weight(self, subset: Subset) -> float:
        """A subset's weight in its section; the number of its items if its count is not known."""
        return subset.weight if subset.count else float(len(self.credits[subset.name].table))

    def of_section(self, of: Mapping[str, Any], section: Section) -> Any:
        """The weighted mean of `of` over a section's subsets; None if `of` has none of them."""
        there = [subset for subset in section.subsets if subset.name in of]
        if not there:
            return None
        weights = [self.weight(subset) for subset in there]
        return sum(w * of[s.name] for w, s in zip(weights, there)) / sum(weights)

    def total(self, of: Mapping[str, Any]) -> Any:
        """The mean of `of` over the sections, or over all items, as far as `of` has them."""
        if self.overall == "sections":
            means = [self.of_section(of, section) for section in self.sections]
            means = [mean for mean in means if mean is not None]
            return sum(means) / len(means)
        sizes = {name: len(self.credits[name].table) for name in of}
        return sum(sizes[name] * of[name] for name in of) / sum(sizes.values())

    def scores(self) -> dict[str, float]:
        """The score of every subset."""
        return {name: credits.score for name, credits in self.credits.items()}

    def bootstrap(self) -> dict[str, Float[np.ndarray, "B"]]:
        """Bootstrap scores of every subset; the same draws for the same number of units."""
        return {
            name: bootstrap_scores(credits, (SEED, number))
            for number, (name, credits) in enumerate(sorted(self.credits.items()))
        }


def benchmark_metrics(scored: ScoredBenchmark, rule: Rule) -> BenchmarkMetrics:
    """Applies each subset's scoring rule to the values that `rule` gives the responses."""
    benchmark, values = scored.data.benchmark, scored.values(rule)
    members: dict[str, list[int]] = {}
    for number, item in enumerate(scored.items):
        members.setdefault(item.subset, []).append(number)
    sections = benchmark.sections or tuple(
        Section(name or "all", (Subset(name),)) for name in sorted(members)
    )
    rules = {s.name: s.rule or benchmark.rule for section in sections for s in section.subsets}
    credits = {
        name: SCORING_RULES[rules[name]](
            [scored.items[i] for i in numbers], [values[i] for i in numbers], benchmark.ties
        )
        for name, numbers in members.items()
        if name in rules
    }
    return BenchmarkMetrics(sections, credits, benchmark.overall)


def score_record(metrics: BenchmarkMetrics) -> dict[str, Any]:
    """Scores, intervals and counts, overall, by section and by subset, in JSON's types."""
    exact, drawn = metrics.scores(), metrics.bootstrap()
    sections = []
    for section in metrics.sections:
        subsets = [
            {
                "name": subset.name or "all",
                "n": _items_in(metrics.credits.get(subset.name)),
                "expected": subset.count or None,
                **_figure(exact.get(subset.name), drawn.get(subset.name)),
                "parts": _parts(metrics.credits.get(subset.name)),
            }
            for subset in section.subsets
        ]
        sections.append(
            {
                "name": section.name,
                "n": sum(subset["n"] for subset in subsets),
                **_figure(metrics.of_section(exact, section), metrics.of_section(drawn, section)),
                "subsets": subsets,
            }
        )
    total = _figure(metrics.total(exact), metrics.total(drawn)) if exact else _figure(None, None)
    return {"overall": total, "sections": sections}


def _figure(score: float | None, drawn: np.ndarray | None) -> dict[str, float | None]:
    if score is None or drawn is None or np.isnan(score):
        return {"score": None, "low": None, "high": None}
    low, high = percentile_interval(drawn)
    return {"score": float(score), "low": low, "high": high}


def _items_in(credits: Credits | None) -> int:
    return sum(map(len, credits.units)) if credits else 0


def _parts(credits: Credits | None) -> dict[str, float | None]:
    """The means of the columns, if the scoring rule has several."""
    if credits is None or len(credits.parts) == 1:
        return {}
    return dict(zip(credits.parts, map(number_or_none, column_means(credits.table))))


def gaps(scored: ScoredBenchmark, metrics: BenchmarkMetrics) -> list[str]:
    """What is missing for the overall score of the whole benchmark, in words; empty if nothing."""
    texts = []
    for section in metrics.sections:
        for subset in section.subsets:
            there = _items_in(metrics.credits.get(subset.name))
            if subset.count and there != subset.count:
                what = f"has {there} of {subset.count} items" if there else "is missing"
                texts.append(f"{' / '.join(dict.fromkeys((section.name, subset.name)))} {what}")
    named = {subset.name for section in metrics.sections for subset in section.subsets}
    for name in sorted({item.subset for item in scored.items} - named):
        count = sum(item.subset == name for item in scored.items)
        texts.append(f"{count} items of the unknown subset {name!r} are left out")
    return texts


def model_comparison(
    scored: ScoredBenchmark, rule: Rule, other: ScoredBenchmark, other_rule: Rule
) -> dict[str, Any]:
    """The paired difference of two models on the items that both have, in JSON's types.

    For the interval the same units are drawn for both models. The test is `sign_test`. Without a
    common item there is only the number of units, 0.
    """
    common = {item.where for item in scored.items} & {item.where for item in other.items}
    sides = []
    for side, by in ((scored, rule), (other, other_rule)):
        kept = [item.where in common for item in side.items]
        part = dataclasses.replace(
            side,
            items=list(itertools.compress(side.items, kept)),
            scores=list(itertools.compress(side.scores, kept)),
        )
        sides.append(benchmark_metrics(part, by))
    first, second = sides
    if not first.credits:
        return {"units": 0}
    differences = first.total(first.bootstrap()) - second.total(second.bootstrap())
    low, high = percentile_interval(differences)
    units = [np.concatenate([s.credits[name].by_unit for name in first.credits]) for s in sides]
    scores = [side.total(side.scores()) for side in sides]
    return {
        "score": number_or_none(scores[0]),
        "other": number_or_none(scores[1]),
        "difference": number_or_none(scores[0] - scores[1]),
        "low": number_or_none(low),
        "high": number_or_none(high),
        "units": len(units[0]),
        **sign_test(*units),
    }
