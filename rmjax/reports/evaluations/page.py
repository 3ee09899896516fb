"""The report of an evaluation: scores first, then the details of each benchmark."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rmjax.evaluation.benchmark_metrics import ScoredBenchmark
from rmjax.evaluation.benchmark_results import weights_of
from rmjax.evaluation.model_evaluation import ModelEvaluation
from rmjax.models.rewards.aggregation import Rule
from rmjax.reports.document import Block, Document, Heading, Headline, Table
from rmjax.reports.evaluations.blocks import detail_blocks, score_blocks
from rmjax.reports.evaluations.wording import points, score, score_interval, title
from rmjax.reports.numbers import DASH, count, decimal, percent, signed
from rmjax.training.workdir import package_versions

EVALUATION_FORMAT = "rmjax.report.evaluation/1"


def evaluation_data(evaluation: ModelEvaluation) -> dict[str, Any]:
    """The numbers of an evaluation, as in `report.json`."""
    scores, fitted = evaluation.scores, evaluation.fitted
    against = {"name": evaluation.against, "benchmarks": evaluation.comparisons}
    return {
        "format": EVALUATION_FORMAT,
        "model": {
            "name": scores.name,
            "attributes": scores.attributes,
            "rule": {"name": scores.rule.name, "weights": weights_of(scores.rule)},
            **scores.facts,
        },
        "versions": package_versions(),
        "work": scores.work,
        "fitted": dataclasses.asdict(fitted) | {"prompts": len(fitted.prompts)} if fitted else None,
        "benchmarks": evaluation.results,
        "against": against if evaluation.against else None,
    }


def evaluation_document(
    report: Mapping[str, Any], benchmarks: Sequence[ScoredBenchmark], rule: Rule
) -> Document:
    """The whole report.

    Args:
      report: from `evaluation_data`.
      benchmarks: their items and scores, for the figures, in the order of the report.
      rule: how scores become the value that decides.
    """
    parts = zip(report["benchmarks"], benchmarks)
    return _document(report, [detail_blocks(b, part, rule) for b, part in parts])


def evaluation_summary(report: Mapping[str, Any]) -> Document:
    """The report without the details of each benchmark, for a terminal."""
    return _document(report, [()] * len(report["benchmarks"]))


def _document(report: Mapping[str, Any], details: Sequence[Iterable[Block]]) -> Document:
    benchmarks = report["benchmarks"]
    blocks: list[Block] = [
        Headline(
            tuple(
                (title(b), score(b.get("overall")), score_interval(b.get("overall")))
                for b in benchmarks[:6]
            )
        ),
        _overview(benchmarks),
    ]
    if report["fitted"]:
        blocks.append(_fitted(report["fitted"]))
    if report["against"]:
        blocks += _against(report)
    for benchmark, more in zip(benchmarks, details):
        blocks += [*score_blocks(benchmark, report["model"]), *more]
    names = ", ".join(b["title"] for b in benchmarks)
    return Document(
        title=f"Evaluation of {report['model']['name']}",
        subtitle=f"{names}; every score with its number of items and a 95 % bootstrap interval",
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
    if model["suffix_turn"]:
        yield "asked after each response", model["suffix_turn"]
    for note in model["unread"]:
        yield "note", note
    yield "computed in", f"{model['dtype']} on {model['devices']}"
    yield (
        "conversations",
        (
            f"{count(work['responses'])} responses, {count(work['conversations'])} of them scored "
            f"now in {decimal(work['seconds'], 1)} s"
        ),
    )
    if work["computed"]:
        saved = percent(1 - work["computed"] / work["tokens"])
        padding = percent(1 - work["computed"] / work["places"])
        yield (
            "tokens",
            f"{count(work['tokens'])}; {saved} of them saved, as responses to one prompt share "
            f"their beginning; {padding} of the computed positions were padding",
        )


def _overview(benchmarks: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            title(b),
            count(b["items"]),
            score(b.get("overall")),
            score_interval(b.get("overall")),
            percent((b.get("length") or {}).get("balanced")),
        )
        for b in benchmarks
    ]
    return Table(
        ("benchmark", "items", "score", "95 % interval", "length-balanced"),
        tuple(rows),
        caption="Scores",
        note="Intervals: bootstrap of the items, 2,000 draws. Length-balanced: the mean of two "
        "accuracies, where the better response is the shorter one and where it is the longer one, "
        "so that a mere preference for length gets 50 %.",
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
            cells = (percent(c["score"]), percent(c["other"]), difference, counts, _p(c["p"]))
        else:
            cells = (DASH,) * 5
        rows.append((b["title"], *cells))
    yield Table(
        ("benchmark", "this", "other", "difference (95 %)", "better on / worse on", "p"),
        tuple(rows),
        note="Difference in percentage points, paired: the bootstrap draws the same items for both "
        "models. p: sign test on the items where they differ (for pairs, McNemar's exact test).",
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else decimal(p)
