"""Files with numbers at their edges: scores, choices, metrics and what reports make of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from campaign import good
from campaign.numbers_case import Case, strict
from campaign.numbers_models import changed

# As JSON writes them, or should not.
_NO_SCORE = ("NaN", "Infinity", "-1e400", "1" + "0" * 400, '"x"', "null", "[1]", "1e39", "1e308")
_STEP = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 9}
_STEP |= {"tokens_per_second": 1.0, "padding": 0.1}
_CONFIG = {"batch_size": 4, "steps": 4, "objective": "regression", "data.train": "rows.jsonl"}


def score_cases() -> Iterator[Case]:
    """Rows with such numbers beside the responses, and files of scores that are evaluated."""
    score = ["score", "model", "rows.jsonl", "out.jsonl"]
    for text, stops, says in (
        ("NaN", "", r"NaN is written as null: weight \(1 rows\)"), ('[1, {"a": NaN}]', "", "null"),
        ("Infinity", "row 1.*cannot be written as JSON", ""), ("1e400", "cannot be written", ""),
        ("-0.0", "", ""), ("1e-320", "", ""), ("1" + "0" * 400, "", ""),
    ):  # fmt: skip

        def make(directory: Path, text: str = text) -> None:
            changed()(directory)
            row = '{"prompt": "a?", "response": "b", "weight": HERE}\n'
            (directory / "rows.jsonl").write_text(row.replace("HERE", text))

        yield Case(f"score: a field of {text[:20]}", make, score, stops, says)

    def table(directory: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        changed()(directory)
        columns = {"prompt": ["a?", "b?"], "response": ["x", "y"], "weight": [1.0, float("nan")]}
        parquet.write_table(pa.table(columns), directory / "rows.parquet")

    yield Case("score: NaN in parquet", table, [*score[:2], "rows.parquet", score[3]], "",
               "NaN is written as null")  # fmt: skip
    evaluate = ["evaluate", "scores.jsonl", "pairs=pairs.jsonl", "--out=out"]
    for text in _NO_SCORE:
        given, stops = _scored(text, "1"), r"scores\.jsonl row 1"
        yield Case(f"evaluate: a score of {text[:20]}", given, evaluate, stops)
    for one, other, wanted in (
        ("3e38", "-3e38", 1.0), ("-0.0", "0", 0.5), ("1e-320", "0", 1.0), ('"0.5"', "0", 1.0),
        ("true", "0", 1.0),
    ):  # fmt: skip
        given = _scored(one, other)
        yield Case(f"evaluate: {one} and {other}", given, evaluate, found=_accuracy(wanted))
    fit = ["evaluate", "scores.jsonl", "pairs=pairs.jsonl", "--out=out", "--fit=pairs.jsonl"]
    for one, other in (("3e38", "-3e38"), ("1e-320", "0"), ("1e-30", "0")):
        yield Case(f"evaluate --fit: {one} and {other}", _scored(one, other), fit,
                   "differ|below 1e|not 0", found=lambda d: "")  # fmt: skip


def _scored(one: str, other: str) -> Callable[[Path], None]:
    """Scores of pairs, each the same two."""

    def make(directory: Path) -> None:
        rows = [row | {"id": str(n)} for n, row in enumerate(good.pair_rows(4))]
        good.write_rows(directory / "pairs.jsonl", rows)
        lines = [f'{{"id": "{n}", "scores": [{one}, {other}]}}\n' for n in range(4)]
        (directory / "scores.jsonl").write_text("".join(lines))

    return make


def _accuracy(wanted: float) -> Callable[[Path], str]:
    def found(directory: Path) -> str:
        (benchmark,) = strict((directory / "out" / "report.json").read_text())["benchmarks"]
        return "" if benchmark["accuracy"] == wanted else f"accuracy {benchmark['accuracy']}"

    return found


def choice_cases() -> Iterator[Case]:
    """Scored responses of which some are chosen."""
    named = '[{"wit": 1}, {"wit": 2}]'

    def row(score: str, ratings: str = named, other: str = "0.5", more: str = "") -> str:
        scores = f'"scores": [{score}, {other}], "attributes": {ratings}{more}'
        return f'{{"prompt": "a?", "responses": ["b", "c"], {scores}}}\n'

    def choose(way: str) -> list[str]:
        return ["choose", "in.jsonl", "out.jsonl", f"--way={way}"]

    def case(name: str, text: str, way: str, stops: str = "", says: str = "") -> Case:
        return Case(f"choose: {name}", lambda d: (d / "in.jsonl").write_text(text), choose(way),
                    stops, says)  # fmt: skip

    for text in ("NaN", "Infinity", "-1e400", "1e308", "1" + "0" * 400, '"1"', "true"):
        yield case(f"a score of {text[:20]}", row(text), "pairs", "'scores' has")
        inner = f'[{{"wit": {text}}}, {{"wit": 2}}]'
        yield case(f"a rating of {text[:20]}", row("1", inner), "steerlm", "'attributes'")
    yield case("a score of null", row("null"), "best-of", "", "without a score")
    yield case("scores of 1e300", row("-1e300"), "pairs", "", "1 written")
    yield case("0 and -0", row("-0.0", other="0"), "pairs", "a tie")
    yield case("1e-320 and 0", row("1e-320", other="0"), "pairs")
    yield case("a rating of 1e300", row("1", '[{"wit": 1e300}, {"wit": 2}]'), "steerlm")
    yield case("an id that is NaN", row("1", more=', "id": NaN'), "pairs", "does not have")


def report_cases() -> Iterator[Case]:
    """Metrics that a run never writes, data with such labels, and judges' scores."""

    def run(lines: list[str]) -> Callable[[Path], None]:
        def make(directory: Path) -> None:
            (directory / "run").mkdir()
            record = {"format": "rmjax-run", "config": _CONFIG}
            (directory / "run" / "config.json").write_text(json.dumps(record))
            text = "".join(f"{line}\n" for line in lines)
            (directory / "run" / "metrics.jsonl").write_text(text)

        return make

    report = ["report", "run"]
    good_steps = [json.dumps({"step": n, **_STEP}) for n in (1, 2, 3)]
    held = {"step": 3, "validation_loss": 0.5, "evaluation_seconds": 1.0, "wit/count": 4}
    held |= {"wit/mse": "HERE", "wit/mse_constant": 1.0, "wit/pearson": "HERE", "wit/pairs": 2}
    for text in ("NaN", "Infinity", "-1e400", "1" + "0" * 400, "null", '"x"', "1e308", "1e-320"):
        for field in ("loss", "grad_norm", "learning_rate", "tokens_per_second"):
            line = json.dumps({"step": 4, **_STEP, field: "HERE"}).replace('"HERE"', text)
            yield Case(f"report: {field} of {text[:20]}", run([*good_steps, line]), report)
        lines = [*good_steps, json.dumps(held).replace('"HERE"', text)]
        yield Case(f"report: metrics of {text[:20]}", run(lines), report)
    for text in ("NaN", "1e400", "1" + "0" * 400, "-1", "true", "1.5"):
        line = json.dumps({"step": "HERE", **_STEP}).replace('"HERE"', text)
        yield Case(f"report: step {text[:20]}", run([*good_steps, line]), report)
    for text, stops in (
        ("NaN", ""), ("null", ""), ("Infinity", "row 1"), ("1e400", "row 1"), ("1e39", "row 1"),
        ("1e38", ""), ("-1e38", ""), ('"4"', "row 1"),
    ):  # fmt: skip

        def data(directory: Path, text: str = text) -> None:
            rows = [f'{{"prompt": "{n}?", "response": "b", "wit": {n}}}\n' for n in range(4)]
            first = f'{{"prompt": "a?", "response": "b", "wit": {text}}}\n'
            (directory / "rows.jsonl").write_text(first + "".join(rows))

        arguments = ["report", "--data=rows.jsonl", "--attributes=wit", "--out=out"]
        yield Case(f"report --data: a label of {text}", data, arguments, stops)
    for text, stops in {"null": "", "1e38": "", "-1e60": "", "NaN": "judge", "Infinity": "judge",
                        "1e400": "judge", "1e308": "judge", '"4"': "judge"}.items():  # fmt: skip
        arguments = ["report", "--rounds", "r0", "r1", "--out=out"]
        yield Case(f"report --rounds: a score of {text}", _rounds(text), arguments, stops)


def _rounds(text: str) -> Callable[[Path], None]:
    """Two rounds of answers and a judge's scores, of which one is this."""

    def make(directory: Path) -> None:
        for number in range(2):
            own = directory / f"r{number}"
            own.mkdir()
            rows: list[dict[str, Any]] = [
                {"prompt": f"{n}?", "responses": ["b" * (n + number + 1)], "ended": [True]}
                for n in range(4)
            ]
            good.write_rows(own / "answers.jsonl", rows)
            scores = [float(np.sin(n + number)) for n in range(4)]
            lines = [
                json.dumps(
                    row
                    | {"attributes": [None], "scores": ["HERE" if not n + number else scores[n]]}
                )
                for n, row in enumerate(rows)
            ]
            whole = "".join(f"{line}\n" for line in lines).replace('"HERE"', text)
            (own / "scores-judge.jsonl").write_text(whole)

    return make
