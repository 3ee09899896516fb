"""Evaluates a reward model on the field's benchmarks, scored exactly, and writes a report.

    python -m rmjax.evaluate MODEL                               # the hub's smaller ones
    python -m rmjax.evaluate MODEL reward-bench rm-bench=FILE    # from the hub or a file
    python -m rmjax.evaluate MODEL pairs=FILE ratings=FILE best-of-n=FILE      # your own data
    python -m rmjax.evaluate MODEL pairs=FILE --against=OTHER    # two models

MODEL is a run (its best checkpoint), an Orbax model, a Hugging Face directory or hub id of a
LlamaForSequenceClassification, a .jsonl file of scores (such as the samples.jsonl of another
evaluation), or baseline:length, which prefers the longer response. FILE is any source of data
(docs/data.md): a file, a directory or a hub id, perhaps with :SPLIT behind it.

OUT gets report.html, report.md, report.json, and samples.jsonl with every score. Scores are kept in
OUT/scores as they are computed: a killed evaluation continues where it was, and no text is scored
twice, in this evaluation or the next.
"""

from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.evaluation.benchmarks import BENCHMARKS, DEFAULT
from rmjax.inference.load_options import add_load_options, load_options
from rmjax.runtime.options import CommandParser

_OVER_LONG = ("truncate_left", "drop")


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", __doc__)
    add = parser.add_argument
    add("model", help="the model, a file of scores, or baseline:length")
    add("benchmarks", nargs="*", metavar="BENCHMARK[=SOURCE]", help=", ".join(BENCHMARKS))
    add("--out", help="directory of the report; by default evaluations/NAME of the model")
    add("--against", default="", metavar="MODEL", help="a second model to compare with")
    add("--value", help="scalar rule: an attribute, a published vector, {JSON}, or weights.json")
    add("--fit", metavar="PAIRS", help="fit weights of the attributes on these pairs")
    add("--gold", default="", metavar="RATING", help="which of several ratings decides")
    add("--max-length", type=int, default=0, help="in tokens; by default the model's own")
    add("--over-long", choices=_OVER_LONG, default=_OVER_LONG[0], help="what to do beyond that")
    add_load_options(parser)
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rmjax.evaluation.benchmark_data import BenchmarkData, read_benchmarks
from rmjax.evaluation.fit_weights import parse_value
from rmjax.evaluation.model_evaluation import evaluate_model, write_samples
from rmjax.evaluation.model_scores import ScoringSettings
from rmjax.runtime.compilation import enable_compilation_cache


def report_evaluation(
    model: str, data: Sequence[BenchmarkData], out: Path, **options: Any
) -> dict[str, Any]:
    """Evaluates a model and writes report and samples.

    Args:
      model: see the top of this file.
      data: the benchmarks.
      out: directory for the report.
      options: of `evaluate_model`.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: a model or an option is bad, or the report cannot be written.
    """
    from rmjax.reports.evaluations.page import evaluation_data, evaluation_document
    from rmjax.reports.writer import write_report

    evaluation = evaluate_model(model, data, out, **options)
    report = evaluation_data(evaluation)
    document = evaluation_document(report, evaluation.benchmarks, evaluation.scores.rule)
    write_report(document, out, report)
    write_samples(out / "samples.jsonl", evaluation.benchmarks, evaluation.scores.rule)
    return report


def _main() -> None:
    from rmjax.reports import terminal
    from rmjax.reports.evaluations.page import evaluation_summary

    args = _parser().parse_args()
    if args.max_length < 0:
        raise UserError(f"--max-length={args.max_length}: expected 0 or more")
    enable_compilation_cache()
    console = Console(highlight=False, soft_wrap=True)
    data = read_benchmarks(args.benchmarks or DEFAULT, args.gold)
    value, known = parse_value(args.value)
    fit = BenchmarkData(BENCHMARKS["pairs"], args.fit, "fit") if args.fit else None
    out = Path(args.out or Path("evaluations") / Path(args.model).name.replace(":", "-"))
    settings = ScoringSettings(args.max_length, args.over_long, **load_options(args))
    report = report_evaluation(
        args.model,
        data,
        out,
        settings=settings,
        value=value,
        known=known,
        against=args.against,
        fit=fit,
    )
    terminal.print_document(evaluation_summary(report), console)
    console.print(f"\n{out / 'report.html'}, report.md, report.json; scores: samples.jsonl")


if __name__ == "__main__":
    exit_with_message(_main)
