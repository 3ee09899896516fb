"""An evaluation as a document that people want to look at."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rmjax.evaluation.tallies import Judged
from rmjax.models.rewards.aggregation import Rule
from rmjax.reports.document import Block, Document, Heading, Headline, Table
from rmjax.reports.evaluations.blocks import details_of, figures_of
from rmjax.reports.evaluations.wording import points, score, score_interval, share, title
from rmjax.reports.numbers import DASH, count, decimal, percent, signed


def document(report: Mapping[str, Any], judged: Sequence[Judged], rule: Rule) -> Document:
    """The page of an evaluation.

    Args:
      report: what `report.json` holds.
      judged: of each benchmark, in the same order: the numbers that figures are made of.
      rule: the one in force.
    """
    details = [details_of(b, part, rule) for b, part in zip(report["benchmarks"], judged)]
    return _document(report, details)


def summary(report: Mapping[str, Any]) -> Document:
    """The part of `document` that fits in a terminal."""
    return _document(report, [()] * len(report["benchmarks"]))


def _document(report: Mapping[str, Any], details: Sequence[Iterable[Block]]) -> Document:
    found = report["benchmarks"]
    blocks: list[Block] = [
        Headline(
            tuple(
                (title(b), score(b.get("overall")), score_interval(b.get("overall")))
                for b in found[:6]
            )
        ),
        _overview(found),
    ]
    if report["fitted"]:
        blocks.append(_fitted(report["fitted"]))
    if report["against"]:
        blocks += _against(report)
    for benchmark, more in zip(found, details):
        blocks += [*figures_of(benchmark, report["model"]), *more]
    names = ", ".join(b["title"] for b in found)
    return Document(
        title=f"Evaluation of {report['model']['name']}",
        subtitle=f"{names}; every figure with its number of items and a 95 % bootstrap interval",
        facts=tuple(_facts(report)),
        blocks=tuple(blocks),
    )


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, work = report["model"], report["work"]
    yield "model", f"{model['name']} ({model['kind']})"
    yield "attributes", ", ".join(model["attributes"])
    weights = " ".join(f"{w:+.4g} {name}" for name, w in model["rule"]["weights"].items())
    yield "value", f"{model['rule']['name']}: {weights}"
    if not work:
        return
    over = {
        "truncate_left": "longer conversations lose their beginning",
        "drop": "items with a longer conversation are left out",
    }
    yield "maximal length", f"{count(model['max_length'])} tokens; {over[model['over_long']]}"
    yield "computed in", f"{model['dtype']} on {model['devices']}"
    yield (
        "conversations",
        (
            f"{count(work['responses'])} responses, {count(work['conversations'])} of them scored "
            f"now in {decimal(work['seconds'], 1)} s"
        ),
    )
    if work["computed"]:
        spared = percent(1 - work["computed"] / work["tokens"])
        padding = percent(1 - work["computed"] / work["places"])
        said = (
            f"{count(work['tokens'])}; {spared} spared: what responses to a prompt begin with is "
            f"computed once; {padding} of the places were padding"
        )
        yield "tokens", said


def _overview(found: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            title(b),
            count(b["items"]),
            score(b.get("overall")),
            score_interval(b.get("overall")),
            share((b.get("length") or {}).get("balanced")),
        )
        for b in found
    ]
    return Table(
        ("benchmark", "items", "score", "95 % interval", "length-balanced"),
        tuple(rows),
        caption="Scores",
        note="Intervals: items drawn again 2,000 times. Length-balanced: the mean of the "
        "accuracies where the better response is the shorter and the longer one, so that a mere "
        "preference for length gets 50 %.",
    )


def _fitted(fitted: Mapping[str, Any]) -> Table:
    return Table(
        ("attribute", "weight"),
        tuple((name, signed(w, 4)) for name, w in fitted["weights"].items()),
        caption="Fitted weights",
        note=f"Logistic regression on {count(fitted['pairs'])} comparisons of {fitted['source']}.",
    )


def _against(report: Mapping[str, Any]) -> Iterator[Block]:
    against = report["against"]
    yield Heading(f"Against {against['name']}")
    rows = []
    for b in report["benchmarks"]:
        c = against["benchmarks"][b["name"]]
        if c["units"]:
            difference = f"{signed(100 * c['difference'], 1)} ({points(c['low'], c['high'])})"
            counts = f"{c['wins']} / {c['losses']}"
            cells = (share(c["score"]), share(c["other"]), difference, counts, _p(c["p"]))
        else:
            cells = (DASH,) * 5
        rows.append((b["title"], *cells))
    yield Table(
        ("benchmark", "this", "other", "difference (95 %)", "better on / worse on", "p"),
        tuple(rows),
        note="Difference in points, paired: the same items drawn again for both. p: sign test on "
        "the items of which one model earns more (for pairs, McNemar's exact test).",
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else decimal(p)
