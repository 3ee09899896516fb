"""Reports on a run from its directory, on data before training, or on rounds of an alignment.

    python -m rmjax.report RUN [--watch[=SECONDS]] [--out=DIR]
    python -m rmjax.report --data=PATH [--split=train] [--attributes=a,b,c] [--ratings=PATH2]
        [--tokenizer=DIR] [--out=DIR]
    python -m rmjax.report --rounds DIR DIR ... [--out=DIR]

RUN is what --config.workdir named, of rmjax.train or of rmjax.align. It may still be running, may
have been killed, and may have no evaluation; it is only read. Its report goes to RUN/report. With
--watch the report is written again when the run's files have changed, looked at every SECONDS (10),
until the run is over or Ctrl-C. A browser loads the page again as often.

PATH holds ratings or preference pairs in any form that training reads: a file, a directory, a hub
id, or generated:COUNT. A directory in HelpSteer2's layout, with train.jsonl.gz and
preference.jsonl.gz (or preference/preference.jsonl.gz), holds both, and the report says how well
they agree. --ratings names ratings that are elsewhere. The report goes to report-NAME.

Each DIR of --rounds holds a policy's answers to the same prompts, answers.jsonl, and scores of
them, scores-NAME.jsonl, as recipes/ writes them. The first is what the others are compared with.
The report goes to report-rounds.

A report is report.html, one file that needs no network; report.md with figures/; and report.json.
docs/train.md, docs/online.md, docs/data.md and docs/alignment.md describe them.
"""

from rmjax.errors import UserError, answer_interrupts, exit_with_message
from rmjax.runtime.options import CommandParser

_WATCH = 10.0  # seconds


def _parser() -> CommandParser:
    parser = CommandParser("report", __doc__)
    parser.add_argument("run", nargs="?", help="directory of a run")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_WATCH,
        metavar="SECONDS",
        help="write RUN's report again when its files change, until it is over",
    )
    parser.add_argument("--data", help="ratings or preference pairs")
    parser.add_argument("--rounds", nargs="+", metavar="DIR", help="of policies' scored answers")
    parser.add_argument("--split", default="train", help="train (the default) or validation")
    parser.add_argument("--attributes", default="", help="columns with ratings: a,b,c")
    parser.add_argument("--ratings", default="", help="ratings of the responses in --data's pairs")
    parser.add_argument("--tokenizer", default="", help="directory, run or .gguf file, for lengths")
    parser.add_argument("--out", default="", help="directory for the report")
    return parser


if __name__ == "__main__":
    answer_interrupts()
    _parser().parse_args()  # --help and mistakes are answered before the imports, which take long

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any

from rich.console import Console

from rmjax.data.records import read_pairs, read_samples
from rmjax.reports import terminal
from rmjax.reports.datasets.lengths import open_tokenizer
from rmjax.reports.datasets.page import DATA_FORMAT, data_document
from rmjax.reports.datasets.preference_statistics import measure_agreement, measure_preferences
from rmjax.reports.datasets.rating_statistics import measure_ratings, rated_responses
from rmjax.reports.datasets.sources import find_attributes, find_sources, short_name
from rmjax.reports.document import Document
from rmjax.reports.writer import write_report

_ANY = (-sys.float_info.max, sys.float_info.max)  # the range of ratings: any finite number


def report_run(run: str, out: str = "", refresh: int = 0) -> tuple[Document, list[Path]]:
    """Writes the report of a run of `rmjax.train` or `rmjax.align`.

    Args:
      run: its directory.
      out: where the report goes; `RUN/report` by default.
      refresh: seconds after which a browser loads the page again, unless the run is over; 0 for
        never.

    Returns:
      The document, and the files that were written.

    Raises:
      UserError: it is not a run, or the report cannot be written.
    """
    from rmjax.reports.alignments.alignment_files import read_alignment
    from rmjax.reports.alignments.page import alignment_data, alignment_document
    from rmjax.reports.runs.page import run_data, run_document
    from rmjax.reports.runs.run_directory import read_run

    directory = Path(run).expanduser()
    files = read_run(directory)
    if files.is_alignment:
        found = read_alignment(files)
        data = alignment_data(found)
        document = alignment_document(found, data)
    else:
        document, data = run_document(files), run_data(files)
    document = dataclasses.replace(document, refresh=0 if files.is_over else refresh)
    return document, write_report(document, Path(out or directory / "report").expanduser(), data)


def watch_run(run: str, out: str = "", *, seconds: float = _WATCH) -> tuple[Document, list[Path]]:
    """Writes the report of a run again and again, until the run is over or Ctrl-C is pressed.

    Args:
      run: its directory.
      out: where the report goes; `RUN/report` by default.
      seconds: how often to look whether the run's files have changed.

    Returns:
      The last document, and the files that were written.

    Raises:
      UserError: it is not a run, or the report cannot be written.
    """
    from rmjax.reports.runs.run_directory import state_of_files

    directory, seen = Path(run).expanduser(), None
    try:
        while True:
            found = state_of_files(directory)
            if found != seen:
                document, written = report_run(run, out, refresh=max(1, round(seconds)))
                print(f"{document.subtitle} {written[0]}", flush=True)
                if not document.refresh:  # the run is over
                    return document, written
                seen = found
            sleep(seconds)
    except KeyboardInterrupt:
        return report_run(run, out)  # a page that does not load again


def report_data(
    source: str,
    *,
    split: str = "train",
    attributes: Sequence[str] = (),
    ratings: str = "",
    tokenizer: str = "",
    out: str = "",
) -> tuple[Document, list[Path]]:
    """Writes the report of ratings, preference pairs, or both.

    Args:
      source: a file, a directory, a hub id or `generated:COUNT`.
      split: `train` or `validation`.
      attributes: the columns that are ratings; by default all columns of numbers.
      ratings: another source of ratings, for the pairs of `source`.
      tokenizer: for lengths in tokens: a directory, a run, a GGUF file or `bytes`.
      out: where the report goes; `report-NAME` by default.

    Returns:
      The document, and the files that were written.

    Raises:
      UserError: a bad row, with its file and field; or the report cannot be written.
    """
    rated, paired = find_sources(source, split, ratings)
    encoder = open_tokenizer(tokenizer) if tokenizer else None
    data: dict[str, Any] = {
        "format": DATA_FORMAT,
        "data": source,
        "split": split,
        "tokenizer": tokenizer or None,
        "ratings": None,
        "preferences": None,
        "agreement": None,
        "notes": [],
    }
    responses = pairs = None
    notes: list[str] = []
    if rated:
        names = tuple(attributes) or find_attributes(rated, split)
        records = read_samples(rated, split, names, _ANY).all()
        samples = [sample for (sample,) in records.entries]
        responses = rated_responses(rated, samples, names, encoder)
        notes += records.notes
        data["ratings"] = measure_ratings(responses, encoder)
    if paired:
        records = read_pairs(paired, split).all()
        pairs = [(better, other) for better, other in records.entries]
        notes += records.notes
        data["preferences"] = measure_preferences(paired, pairs, encoder)
    if responses and pairs:
        data["agreement"] = measure_agreement(pairs, responses)
    data["notes"] = list(dict.fromkeys(notes))
    name = short_name(source)
    document = data_document(name, data, responses, pairs)
    return document, write_report(document, Path(out or f"report-{name}").expanduser(), data)


def report_rounds(directories: Sequence[str], out: str = "") -> tuple[Document, list[Path]]:
    """Writes the page that compares the rounds of an alignment.

    Args:
      directories: of the rounds, the one that the others are compared with first.
      out: where the report goes; `report-rounds` by default.

    Returns:
      The document, and the files that were written.

    Raises:
      UserError: a file is missing or broken, rounds are of different prompts, or the report cannot
        be written.
    """
    from rmjax.reports.rounds.answers import check_same_prompts, read_round
    from rmjax.reports.rounds.page import rounds_data, rounds_document

    rounds = [read_round(directory) for directory in directories]
    check_same_prompts(rounds)
    data = rounds_data(rounds)
    document = rounds_document(rounds, data)
    return document, write_report(document, Path(out or "report-rounds").expanduser(), data)


def _main() -> None:
    args = _parser().parse_args()
    if [bool(args.run), bool(args.data), bool(args.rounds)].count(True) != 1:
        raise UserError("give RUN, a run's directory, or --data=PATH, or --rounds DIR ...")
    if args.watch is not None and not args.run:
        raise UserError("--watch goes with RUN")
    if args.watch is not None and not args.watch >= 1:
        raise UserError(f"--watch={args.watch:g}: expected seconds, 1 or more")
    if args.rounds:
        document, files = report_rounds(args.rounds, args.out)
    elif args.run:
        for option in ("attributes", "ratings", "tokenizer"):
            if getattr(args, option):
                raise UserError(f"--{option} goes with --data")
        if args.watch is None:
            document, files = report_run(args.run, args.out)
        else:
            document, files = watch_run(args.run, args.out, seconds=args.watch)
    else:
        document, files = report_data(
            args.data,
            split=args.split,
            attributes=tuple(filter(None, args.attributes.split(","))),
            ratings=args.ratings,
            tokenizer=args.tokenizer,
            out=args.out,
        )
    terminal.print_document(document, Console(highlight=False))
    print("\nwritten: " + "\n         ".join(map(str, files)))


if __name__ == "__main__":
    exit_with_message(_main)
