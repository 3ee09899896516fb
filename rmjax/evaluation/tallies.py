"""From credits to scores: of subsets, sections and the whole, with intervals."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmjax.evaluation.benchmarks import Section, Subset
from rmjax.evaluation.items import Data, Item
from rmjax.evaluation.score_cache import ItemScores
from rmjax.evaluation.scoring_rules import RULES, Credits
from rmjax.evaluation.statistics import draws, interval, sign_test
from rmjax.models.rewards.aggregation import Rule

SEED = 0  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Judged:
    """One benchmark's items with one model's scores.

    Attributes:
      data: the benchmark's.
      attributes: columns of the scores.
      items: those that are judged.
      scores: of each.
      cut: how many of all items had a response that was too long.
      dropped: how many of these are left out.
    """

    data: Data
    attributes: tuple[str, ...]
    items: list[Item]
    scores: list[ItemScores]
    cut: int
    dropped: int

    @classmethod
    def of(
        cls, data: Data, attributes: tuple[str, ...], scores: Sequence[ItemScores], over_long: str
    ) -> "Judged":
        """Applies the policy `over_long`: `truncate_left`, or `drop` for the whole item."""
        kept = [not (over_long == "drop" and s.cut.any()) for s in scores]
        return cls(
            data,
            attributes,
            list(itertools.compress(data.items, kept)),
            list(itertools.compress(scores, kept)),
            cut=sum(bool(s.cut.any()) for s in scores),
            dropped=len(kept) - sum(kept),
        )

    def values(self, rule: Rule) -> list[Float[np.ndarray, "n"]]:
        """Each item's responses by the rule; 0 of one that has none to be compared with."""
        return [np.nan_to_num(rule.values(s.scores)) for s in self.scores]


@dataclasses.dataclass(frozen=True)
class Tally:
    """Credits by subset.

    Attributes:
      sections: in the order of the report.
      credits: of the subsets that have items.
      overall: `sections` or `items`; see `benchmarks.Benchmark`.
    """

    sections: tuple[Section, ...]
    credits: dict[str, Credits]
    overall: str

    def weight(self, subset: Subset) -> float:
        """In its section; a subset of no published count weighs what it holds."""
        return subset.weight if subset.count else float(len(self.credits[subset.name].table))

    def of_section(self, of: Mapping[str, Any], section: Section) -> Any:
        """The weighted mean of what `of` has of a section's subsets; None where it has none."""
        there = [subset for subset in section.subsets if subset.name in of]
        if not there:
            return None
        weights = [self.weight(subset) for subset in there]
        return sum(w * of[s.name] for w, s in zip(weights, there)) / sum(weights)

    def total(self, of: Mapping[str, Any]) -> Any:
        """The mean of the sections, or of all items, over what is there."""
        if self.overall == "sections":
            found = [self.of_section(of, section) for section in self.sections]
            found = [value for value in found if value is not None]
            return sum(found) / len(found)
        sizes = {name: len(self.credits[name].table) for name in of}
        return sum(sizes[name] * of[name] for name in of) / sum(sizes.values())

    def exact(self) -> dict[str, float]:
        """The score of every subset."""
        return {name: credits.score for name, credits in self.credits.items()}

    def drawn(self) -> dict[str, Float[np.ndarray, "B"]]:
        """Scores of every subset from units drawn again; of equal units in equal draws."""
        return {
            name: draws(credits, (SEED, number))
            for number, (name, credits) in enumerate(sorted(self.credits.items()))
        }


def tally(judged: Judged, rule: Rule) -> Tally:
    """Applies the rule's values, and to them each subset's way of scoring."""
    benchmark, values = judged.data.benchmark, judged.values(rule)
    members: dict[str, list[int]] = {}
    for number, item in enumerate(judged.items):
        members.setdefault(item.subset, []).append(number)
    sections = benchmark.sections or tuple(
        Section(name or "all", (Subset(name),)) for name in sorted(members)
    )
    rules = {s.name: s.rule or benchmark.rule for section in sections for s in section.subsets}
    credits = {
        name: RULES[rules[name]](
            [judged.items[i] for i in numbers], [values[i] for i in numbers], benchmark.ties
        )
        for name, numbers in members.items()
        if name in rules
    }
    return Tally(sections, credits, benchmark.overall)


def scores_of(found: Tally) -> dict[str, Any]:
    """Score, interval and counts, overall, by section and by subset, in JSON's types."""
    exact, drawn = found.exact(), found.drawn()
    sections = []
    for section in found.sections:
        subsets = [
            {
                "name": subset.name or "all",
                "n": _items_in(found.credits.get(subset.name)),
                "expected": subset.count or None,
                **_figure(exact.get(subset.name), drawn.get(subset.name)),
                "parts": _parts(found.credits.get(subset.name)),
            }
            for subset in section.subsets
        ]
        sections.append(
            {
                "name": section.name,
                "n": sum(subset["n"] for subset in subsets),
                **_figure(found.of_section(exact, section), found.of_section(drawn, section)),
                "subsets": subsets,
            }
        )
    total = _figure(found.total(exact), found.total(drawn)) if exact else _figure(None, None)
    return {"overall": total, "sections": sections}


def _figure(score: float | None, drawn: np.ndarray | None) -> dict[str, float | None]:
    if score is None or drawn is None or np.isnan(score):
        return {"score": None, "low": None, "high": None}
    low, high = interval(drawn)
    return {"score": float(score), "low": low, "high": high}


def _items_in(credits: Credits | None) -> int:
    return sum(map(len, credits.units)) if credits else 0


def _parts(credits: Credits | None) -> dict[str, float | None]:
    """Means of the columns, where a way of scoring has several."""
    if credits is None or len(credits.parts) == 1:
        return {}
    defined = ~np.isnan(credits.table)
    sums = np.where(defined, credits.table, 0.0).sum(axis=0)
    return {
        name: float(total / count) if count else None
        for name, total, count in zip(credits.parts, sums, defined.sum(axis=0))
    }


def gaps(judged: Judged, found: Tally) -> list[str]:
    """Why the overall figure is not that of the whole benchmark; empty if it is."""
    said = []
    for section in found.sections:
        for subset in section.subsets:
            there = _items_in(found.credits.get(subset.name))
            if subset.count and there != subset.count:
                what = f"has {there} of {subset.count} items" if there else "is missing"
                named = (
                    section.name
                    if section.name == subset.name
                    else (f"{section.name} / {subset.name}")
                )
                said.append(f"{named} {what}")
    named = {subset.name for section in found.sections for subset in section.subsets}
    for name in sorted({item.subset for item in judged.items} - named):
        count = sum(item.subset == name for item in judged.items)
        said.append(f"{count} items of the unknown subset {name!r} are left out")
    return said


def comparison(judged: Judged, rule: Rule, other: Judged, other_rule: Rule) -> dict[str, Any]:
    """The difference of two models on the items that both were judged on, paired.

    The interval is of units drawn again, the same for both; the test is on the units of which one
    model earns more. None of it is done where no item is common.
    """
    common = {item.where for item in judged.items} & {item.where for item in other.items}
    sides = []
    for side, by in ((judged, rule), (other, other_rule)):
        kept = [item.where in common for item in side.items]
        part = dataclasses.replace(
            side,
            items=list(itertools.compress(side.items, kept)),
            scores=list(itertools.compress(side.scores, kept)),
        )
        sides.append(tally(part, by))
    first, second = sides
    if not first.credits:
        return {"units": 0}
    low, high = interval(first.total(first.drawn()) - second.total(second.drawn()))
    units = [np.concatenate([s.credits[name].by_unit for name in first.credits]) for s in sides]
    scores = [side.total(side.exact()) for side in sides]
    return {
        "score": scores[0],
        "other": scores[1],
        "difference": scores[0] - scores[1],
        "low": low,
        "high": high,
        "units": len(units[0]),
        **sign_test(*units),
    }
