"""The section of one benchmark in the report of an evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from rmjax.evaluation.benchmark_metrics import ScoredBenchmark
from rmjax.evaluation.comparisons import Comparisons
from rmjax.models.rewards.aggregation import Rule
from rmjax.reports import plots
from rmjax.reports.document import (
    Block,
    Collapsible,
    Example,
    Facts,
    Figure,
    Heading,
    Table,
    Text,
    Warning,
)
from rmjax.reports.evaluations.wording import score, score_interval, slug
from rmjax.reports.numbers import count, decimal, interval, percent, short, signed
from rmjax.reports.plots import Curve

_MOST = 12  # subsets whose distributions are drawn separately
_MOST_GAPS = 30  # that are named
_MOST_ROWS = 60  # subsets in a table or a figure; of more there are only the sections
_MOST_COLUMNS = 8  # sections beside each other


def score_blocks(b: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[Block]:
    """What every format shows, a terminal too: warnings, facts, scores."""
    yield Heading(b["title"])
    for text in b["warnings"]:
        yield Warning(text)
    if b["gaps"]:
        rest = len(b["gaps"]) - _MOST_GAPS
        more = [f"and {rest} more, which report.json names"] if rest > 0 else []
        yield Warning(
            "not the whole benchmark, so there is no overall score to quote: "
            + "; ".join([*b["gaps"][:_MOST_GAPS], *more])
        )
    dropped = ", ".join(f"{n} ({reason})" for reason, n in b["dropped"].items())
    yield Facts(
        (
            ("data", b["source"]),
            ("items", f"{count(b['items'])} with {count(b['responses'])} responses"),
            ("value", model["rule"]["name"]),
            ("scoring", b["scoring"]),
            ("cut", _cut(b, model)),
            ("dropped", dropped or "none"),
            *(("note", note) for note in b["notes"]),
        )
    )
    if not b["items"]:
        return
    yield _subsets(b)
    if len(b["rules"]) > 1:
        yield _rules(b)


def detail_blocks(b: Mapping[str, Any], scored: ScoredBenchmark, rule: Rule) -> Iterator[Block]:
    """What only the files show: figures, length, calibration, ratings, mistakes."""
    if not b["items"]:
        return
    yield from _figures(b, scored, rule)
    yield _lengths(b)
    if b["strengths"]:
        yield _strengths(b)
    yield from _curves(b)
    yield from _attributes(b)
    if b["mistakes"]:
        examples = tuple(_example(m, b["gold"]) for m in b["mistakes"])
        yield Collapsible(f"The {len(examples)} worst mistakes", examples)


def _cut(b: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    cut = f"{count(b['cut'])} of {count(b['items'])} items"
    if "max_length" not in model:
        return cut
    return f"{cut}: a response beyond {count(model['max_length'])} tokens"


def _subsets(b: Mapping[str, Any]) -> Table:
    parts = list(dict.fromkeys(p for s in b["sections"] for u in s["subsets"] for p in u["parts"]))
    rows, strong, brief = [], [], _is_brief(b)
    for section in b["sections"]:
        alone = len(section["subsets"]) == 1
        for subset in () if brief else section["subsets"]:
            shown = section["name"] if alone else f"{section['name']} / {_named(section, subset)}"
            expected = f" of {subset['expected']}" if subset["expected"] else ""
            rows.append((shown, f"{subset['n']}{expected}", *_row(subset, parts)))
        if brief or not alone:
            strong += [] if brief else [len(rows)]
            rows.append((section["name"], count(section["n"]), *_row(section, parts)))
    if len(b["sections"]) > 1:
        strong.append(len(rows))
        name = "overall" if b["complete"] else "of what is there"
        rows.append((name, count(b["items"]), *_row(b["overall"], parts)))
    return Table(
        ("subset", "items", "score", "95 % interval", *parts),
        tuple(rows),
        caption="By section; subsets are in report.json" if brief else "By section",
        strong=tuple(strong),
    )


def _is_brief(b: Mapping[str, Any]) -> bool:
    subsets = sum(len(section["subsets"]) for section in b["sections"])
    return subsets > max(_MOST_ROWS, len(b["sections"]))


def _row(figures: Mapping[str, Any], parts: Sequence[str]) -> tuple[str, ...]:
    own = figures.get("parts", {})
    return (score(figures), score_interval(figures), *(percent(own.get(p)) for p in parts))


def _rules(b: Mapping[str, Any]) -> Table:
    sections = [s["name"] for s in b["sections"]]
    sections = sections if 1 < len(sections) <= _MOST_COLUMNS else []
    rows = [
        (name, score(r), score_interval(r), *(percent(r["sections"].get(s)) for s in sections))
        for name, r in b["rules"].items()
    ]
    return Table(
        ("value", "score", "95 % interval", *sections),
        tuple(rows),
        caption="The same scores read in other ways",
        note="Each attribute alone and every named weight vector, from the same scores. The first "
        "row is the value that all other figures are about.",
        strong=(0,),
    )


def _figures(b: Mapping[str, Any], scored: ScoredBenchmark, rule: Rule) -> Iterator[Block]:
    values, name = scored.values(rule), slug(b["name"])
    comparisons = Comparisons.of(scored.items, values)
    margins, credits = comparisons.margins, comparisons.credits
    bars = [(_named(s, u), u) for s in b["sections"] for u in s["subsets"] if u["score"]]
    if _is_brief(b):
        bars = [(section["name"], section) for section in b["sections"] if section["score"]]
    elif len({label for label, _ in bars}) < len(bars):
        bars = [(subset["name"], subset) for _, subset in bars]
    if len(bars) > 1:
        scores, low, high = ([100 * u[f] for _, u in bars] for f in ("score", "low", "high"))
        lists = any(len(item.responses) > 2 for item in scored.items)
        of_lists = scored.data.benchmark.rule in ("best_of", "pairs") and lists
        chance = None if of_lists else 50
        yield Figure(
            plots.bars([label for label, _ in bars], scores, "score, %", low, high, chance),
            f"{name}-subsets",
            "; ".join(f"{label} {score(u)}" for label, u in bars),
            "Score of each subset, with its interval.",
        )
    yield Figure(
        plots.distributions(_values_by_gold(scored, values), "value"),
        f"{name}-values",
        f"Distributions of the value of good and other responses of {b['title']}.",
        "Values of good and of other responses."
        if not scored.data.gold
        else f"Values of responses whose {scored.data.gold} is above the mean, and of the others.",
    )
    if not len(margins):
        return
    yield Figure(
        plots.margin_histogram(margins, "margin"),
        f"{name}-margins",
        f"{percent(float((margins > 0).mean()))} of the margins are positive.",
        "Margins: the value of the better response minus that of the worse.",
    )
    yield Figure(
        plots.reliability(scipy.special.expit(np.abs(margins)), credits),
        f"{name}-calibration",
        f"Calibration error {decimal(b['calibration']['error'])}.",
        "Whether sigmoid(margin) is the probability of being right; expected calibration error "
        f"{decimal(b['calibration']['error'])}, fitted temperature "
        f"{decimal(b['calibration']['temperature'])}.",
    )
    yield Figure(
        plots.accuracy_by_length(comparisons.longer, credits, "length difference, characters"),
        f"{name}-length",
        f"Length-balanced accuracy {percent(b['length']['balanced'])}.",
        "Accuracy by how much longer the better response is than the worse one.",
    )


def _values_by_gold(scored: ScoredBenchmark, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Values of good and of other responses, for each subset if there are not too many."""
    golds = [np.asarray(item.gold) for item in scored.items]
    middle = np.nanmean(np.concatenate(golds)) if scored.data.gold else 0.5
    separate = 1 < len({item.subset for item in scored.items}) <= _MOST
    groups: dict[str, list[np.ndarray]] = {}
    for item, value, gold in zip(scored.items, values, golds):
        subset = f"{item.subset}, " if separate else ""
        groups.setdefault(f"{subset}good", []).append(value[gold > middle])
        groups.setdefault(f"{subset}other", []).append(value[gold <= middle])
    return {name: np.concatenate(groups[name]) for name in sorted(groups)}


def _named(section: Mapping[str, Any], subset: Mapping[str, Any]) -> str:
    alone = len(section["subsets"]) == 1
    return section["name"] if alone else subset["name"].rpartition("/")[2]


def _lengths(b: Mapping[str, Any]) -> Table:
    length = b["length"]
    rows = [
        (name, count(part["pairs"]), percent(part["accuracy"]))
        for name, part in length["parts"].items()
    ]
    return Table(
        ("", "comparisons", "accuracy"),
        (*rows, ("length-balanced", count(b["comparisons"]), percent(length["balanced"]))),
        caption="Length",
        note="Comparisons of a better with a worse response to one prompt; equal values count one "
        "half. Correlation of value and characters, each minus its mean over the prompt: "
        f"{decimal(length['correlation'])}.",
        strong=(len(rows),),
    )


def _strengths(b: Mapping[str, Any]) -> Table:
    rows = [
        (strength, count(part["pairs"]), percent(part["accuracy"]))
        for strength, part in b["strengths"].items()
    ]
    return Table(("strength of the preference", "pairs", "accuracy"), tuple(rows))


def _curves(b: Mapping[str, Any]) -> Iterator[Block]:
    curves = b["best_of_n"]
    if not curves:
        return
    rows = []
    for name, curve in curves.items():
        first, last = curve[0], curve[-1]
        rows.append(
            (
                name,
                count(last["prompts"]),
                decimal(first["chosen"]),
                f"{decimal(last['chosen'])} ({interval(last['low'], last['high'])})",
                decimal(last["best"]),
            )
        )
    n = max(len(curve) for curve in curves.values())
    yield Table(
        ("measured by", "prompts", "of 1 (random)", f"best of {n} by value (95 %)", f"best of {n}"),
        tuple(rows),
        caption="Best of n",
        note="Mean over prompts of what the response with the highest value is worth by this "
        "measure, exact over all choices of n responses, and of what the best response is worth.",
    )
    name, curve = next(iter(curves.items()))
    x, chosen, low, high, best = (
        [point[field] for point in curve] for field in ("n", "chosen", "low", "high", "best")
    )
    lines = [
        Curve("highest value", x, chosen, low, high),
        Curve("best possible", x, best, dashed=True),
    ]
    yield Figure(
        plots.best_of_n(lines, name),
        f"{slug(b['name'])}-best-of-n",
        f"From {decimal(curve[0]['chosen'])} for one to {decimal(curve[-1]['chosen'])}.",
        f"Mean {name} of the response with the highest value of n.",
    )


def _attributes(b: Mapping[str, Any]) -> Iterator[Block]:
    attributes = b["attributes"]
    names = attributes["names"]
    if len(names) > 1:
        matrix = np.asarray(attributes["correlations"], float)
        yield Figure(
            plots.correlation_matrix(names, matrix),
            f"{slug(b['name'])}-attributes",
            "Correlations of the attributes with each other.",
            "Correlations of the attributes with each other, over all responses.",
        )
    if "ratings" in attributes:
        rated = attributes["ratings"]
        yield Table(
            ("rating", *names),
            tuple(
                (name, *map(decimal, column))
                for name, column in zip(rated["names"], zip(*rated["correlations"]))
            ),
            caption="Correlation of the attributes with people's ratings",
        )
    if "agreement" in attributes:
        rows = [
            (
                name,
                count(row["count"]),
                *(decimal(row[k]) for k in ("mse", "mse_constant", "pearson", "spearman")),
                percent(row["pair_accuracy"]),
            )
            for name, row in attributes["agreement"].items()
        ]
        yield Table(
            ("attribute", "ratings", "MSE", "MSE of the mean", "Pearson", "Spearman", "pairs"),
            tuple(rows),
            caption="Attributes and the ratings of the same name",
            note="MSE of the mean: always answering the mean of these ratings.",
        )


def _example(mistake: Mapping[str, Any], gold: str | None) -> Example:
    prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in mistake["prompt"])

    def numbers(side: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        rated = ((gold, short(side["gold"])),) if gold else ()
        return (("value", decimal(side["value"])), *rated)

    better, worse = mistake["better"], mistake["worse"]
    where = f"{mistake['subset']} " if mistake["subset"] else ""
    return Example(
        f"{where}{mistake['id']}",
        (
            Text("prompt", prompt, "prompt"),
            Text("better", better["text"], "chosen", numbers(better)),
            Text("worse", worse["text"], "rejected", numbers(worse)),
        ),
        (("margin", signed(mistake["margin"])),),
    )
