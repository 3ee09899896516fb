"""Rated responses and preference pairs: from the hub, local files like the hub's, or generated."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from rmjax.data.generated import generate
from rmjax.errors import UserError

GENERATED = "generated:"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}


def read_rows(source: str, split: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """What messages call a source, and its rows as they are.

    Args:
      source: as in `read_samples`; a local file may also be a `.json` list of objects.
      split: of the source.

    Raises:
      UserError: there is no such source, or it cannot be read.
    """
    return origin(source, split), rows_of(source, split)


def rows_of(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are; see `read_rows`."""
    file = _local_file(source, split)
    if file is None:
        generated = source.startswith(GENERATED)
        return _generated_rows(source, split) if generated else iter(_hub_data(source, split))
    if file.suffix == ".json":
        return _json_list(file)
    return _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)


def _local_file(source: str, split: str) -> Path | None:
    """The file that holds a split; None for a hub id or generated rows."""
    if source.startswith(GENERATED):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        whole = [path / f"preference{suffix}" for suffix in _SUFFIXES]  # its rows name their split
        return next(filter(Path.exists, whole), None) or _split_file(path, split)
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; supported: {', '.join(_SUFFIXES)}")
        return path
    if (
        source.startswith((".", "/", "~"))
        or source.endswith(_SUFFIXES)
        or source.count("/") not in (1, 2)
    ):
        raise UserError(f"{source}: there is no such file or directory")
    return None


def _split_file(directory: Path, split: str) -> Path:
    found = [directory / f"{split}{suffix}" for suffix in _SUFFIXES]
    found = [file for file in found if file.exists()]
    if not found:  # as the hub stores a data set whose split is one file
        found = [*directory.glob(f"{split}-*.parquet"), *directory.glob(f"data/{split}-*.parquet")]
    if len(found) != 1:
        names = ", ".join(f"{split}{suffix}" for suffix in _SUFFIXES)
        raise UserError(f"{directory}: expected one of {names}, found {len(found)} of them")
    return found[0]


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    # Line by line, each value as it is written. pyarrow and datasets guess a column's type from
    # its first block: a date-like text becomes a date, a 2.5 after 10 MB of whole numbers an error.
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as lines:
            for number, line in enumerate(filter(bytes.strip, lines), start=1):
                yield _parse_line(line, f"{file} row {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _json_list(file: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: expected a list of JSON objects (or a .jsonl file, one a line)")
    return iter(rows)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _hub_data(source: str, split: str) -> Any:
    owner, name, *directory = source.split("/")
    try:
        if directory:  # such as HelpSteer2's preferences, whose rows name their split
            return datasets.load_dataset(f"{owner}/{name}", data_dir=directory[0], split="train")
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # no network, no such data set, no such split: datasets says which
        raise UserError(
            f"{source}: not a local path, and the hub does not give it ({error})"
        ) from error


def _generated_rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    count = source.removeprefix(GENERATED)
    if not count.isdecimal() or int(count) < 2:
        raise UserError(f"{source}: expected generated:COUNT with COUNT at least 2")
    return generate(int(count), split)


def origin(source: str, split: str) -> str:
    """What messages call the data behind `source`: the file, or the hub id and the split."""
    return str(_local_file(source, split) or f"{source} {split}")


def fingerprint(source: str, split: str) -> str:
    """Changes when the data behind `source` change: a file's bytes, a hub data set's contents."""
    file = _local_file(source, split)
    if file is None:
        digest = hashlib.sha256(f"{source} {split}".encode())
        if not source.startswith(GENERATED):
            for batch in _hub_data(source, split).data.to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


datasets.disable_progress_bars()
