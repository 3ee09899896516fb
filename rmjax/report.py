"""Reports: of a training run from its directory, or of data before anything is trained on them.

    python -m rmjax.report RUN [--out=DIR]
    python -m rmjax.report --data=PATH [--split=train] [--attributes=a,b,c] [--ratings=PATH2]
        [--tokenizer=DIR] [--out=DIR]

RUN is what --config.workdir named. It may go on, have been killed, or have no evaluation; it is
only read. Its report goes to RUN/report.

PATH holds ratings or preference pairs in any form that training takes: a file, a directory, a hub
id, or generated:COUNT. A directory in HelpSteer2's layout, with train.jsonl.gz and
preference.jsonl.gz (or preference/preference.jsonl.gz), holds both, and the report says how well
they agree; --ratings names ratings that lie elsewhere. The report goes to report-NAME.

A report is report.html, one file that needs no network, report.md with figures/, and report.json.
docs/reports.md says what is in each.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rmjax.data.readers import GENERATED
from rmjax.data.records import describe, read_pairs, read_samples
from rmjax.errors import UserError, exit_with_message
from rmjax.reports import terminal, write
from rmjax.reports.datasets.lengths import open_tokenizer
from rmjax.reports.datasets.page import FORMAT, data_document
from rmjax.reports.datasets.preferences import measure_agreement, measure_preferences
from rmjax.reports.datasets.ratings import make_ratings, measure_ratings
from rmjax.reports.document import Document

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Any number that is one.
_ANY = (-sys.float_info.max, sys.float_info.max)
# Columns of numbers that no one rated.
_NOT_RATINGS = ("id", "idx", "index", "row", "seed", "turn", "turns", "split")


def report_run(run: str, out: str = "") -> tuple[Document, list[Path]]:
    """Reports a training run.

    Args:
      run: its directory.
      out: where the report goes; `RUN/report` by default.

    Returns:
      What is shown, and the files that were written.

    Raises:
      UserError: it is not a run, or the report cannot be written.
    """
    from rmjax.reports.runs.files import read_run
    from rmjax.reports.runs.page import run_data, run_document

    directory = Path(run).expanduser()
    found = read_run(directory)
    document = run_document(found)
    return document, write(document, Path(out or directory / "report"), run_data(found))


def report_data(
    source: str,
    *,
    split: str = "train",
    attributes: Sequence[str] = (),
    ratings: str = "",
    tokenizer: str = "",
    out: str = "",
) -> tuple[Document, list[Path]]:
    """Reports ratings, preferences, or both.

    Args:
      source: what to read.
      split: `train` or `validation`.
      attributes: the columns that are ratings; by default all columns of numbers.
      ratings: a second source, of ratings, for the pairs of the first.
      tokenizer: for lengths in tokens: a directory, a run, a GGUF file or `bytes`.
      out: where the report goes; `report-NAME` by default.

    Returns:
      What is shown, and the files that were written.

    Raises:
      UserError: naming file, row and field; or the report cannot be written.
    """
    rated, paired = _find(source, split, ratings)
    encoder = open_tokenizer(tokenizer) if tokenizer else None
    data: dict[str, Any] = {
        "format": FORMAT,
        "data": source,
        "split": split,
        "tokenizer": tokenizer or None,
        "ratings": None,
        "preferences": None,
        "agreement": None,
    }
    found = pairs = None
    if rated:
        names = tuple(attributes) or _attributes(rated, split)
        samples = read_samples(rated, split, names, _ANY)
        found = make_ratings(rated, samples, names, encoder)
        data["ratings"] = measure_ratings(found, encoder)
    if paired:
        pairs = read_pairs(paired, split)
        data["preferences"] = measure_preferences(paired, pairs, encoder)
    if found and pairs:
        data["agreement"] = measure_agreement(pairs, found)
    name = _name(source)
    document = data_document(name, data, found, pairs)
    return document, write(document, Path(out or f"report-{name}").expanduser(), data)


def _find(source: str, split: str, ratings: str) -> tuple[str, str]:
    """Where ratings and where pairs are; empty for none."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        rated = _first(directory, [split])
        paired = _first(directory, ["preference", "preference/preference"])
        if rated and describe(rated, split)[0] == "pairs":
            rated, paired = "", paired or rated
        if not (rated or paired):
            raise UserError(
                f"{source}: neither {split} nor preference there, as "
                f"{', '.join(_SUFFIXES)}; name a file, or another --split"
            )
    else:
        kind = describe(source, split)[0]
        rated, paired = (source, "") if kind == "ratings" else ("", source)
    if ratings:
        if not paired:
            raise UserError(f"--ratings={ratings}: {source} holds no pairs to compare them with")
        beside = Path(ratings).expanduser()
        rated = (_first(beside, [split]) if beside.is_dir() else ratings) or ratings
        if describe(rated, split)[0] != "ratings":
            raise UserError(f"--ratings={ratings}: there are pairs in it, not ratings")
    return rated, paired


def _first(directory: Path, names: Sequence[str]) -> str:
    paths = [directory / f"{name}{suffix}" for name in names for suffix in _SUFFIXES]
    return next((str(path) for path in paths if path.exists()), "")


def _attributes(source: str, split: str) -> tuple[str, ...]:
    names = describe(source, split)[1]
    found = tuple(
        name for name in names if name.lower() not in _NOT_RATINGS and not name.endswith("_id")
    )
    if not found:
        raise UserError(
            f"{source}: no column holds numbers in every row; name the ratings with "
            "--attributes=a,b,c"
        )
    return found


def _name(source: str) -> str:
    """A short name of the data, which can be a directory's."""
    last = source.replace(":", "-") if source.startswith(GENERATED) else Path(source).name
    for suffix in _SUFFIXES[::-1]:
        last = last.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "data"


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rmjax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", help="directory of a training run")
    parser.add_argument("--data", help="ratings or preference pairs")
    parser.add_argument("--split", default="train", help="train (the default) or validation")
    parser.add_argument("--attributes", default="", help="columns with ratings: a,b,c")
    parser.add_argument("--ratings", default="", help="ratings of the responses in --data's pairs")
    parser.add_argument("--tokenizer", default="", help="directory, run or .gguf file, for lengths")
    parser.add_argument("--out", default="", help="directory for the report")
    args = parser.parse_args()
    if bool(args.run) == bool(args.data):
        raise UserError("give RUN, a training run's directory, or --data=PATH")
    if args.run:
        for option in ("attributes", "ratings", "tokenizer"):
            if getattr(args, option):
                raise UserError(f"--{option} goes with --data")
        document, files = report_run(args.run, args.out)
    else:
        document, files = report_data(
            args.data,
            split=args.split,
            attributes=tuple(filter(None, args.attributes.split(","))),
            ratings=args.ratings,
            tokenizer=args.tokenizer,
            out=args.out,
        )
    terminal.show(document, Console(highlight=False))
    print("\nwritten: " + "\n         ".join(map(str, files)))


if __name__ == "__main__":
    exit_with_message(_main)
