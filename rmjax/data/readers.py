"""The rows of a data source: local files, the Hugging Face hub, or generated ones.

datasets and pyarrow take seconds to import and most sources need neither, so they are imported
where they are used.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmjax.data.generated import generate
from rmjax.errors import UserError

GENERATED = "generated:"
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def read_rows(source: str, split: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """What messages call a source, and its rows as they are.

    Args:
      source: a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a `.json` file with a list of objects;
        a directory that holds such a file named `<split>`, or `preference` for both splits; a hub
        id such as `nvidia/HelpSteer2`, or with one of its directories,
        `nvidia/HelpSteer2/preference`; or `generated:COUNT`.
      split: `train`, `validation`, or another that the source has.

    Raises:
      UserError: there is no such source, or it cannot be read.
    """
    file = _local_file(source, split)
    if file is None:
        generated = source.startswith(GENERATED)
        rows = _generated_rows(source, split) if generated else iter(_hub_data(source, split))
    elif file.suffix == ".json":
        rows = _json_list(file)
    else:
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    return origin(source, split), rows


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
    files = [directory / f"{split}{suffix}" for suffix in _SUFFIXES]
    files = [file for file in files if file.exists()]
    if not files:  # as the hub stores a data set whose split is one file
        files = [*directory.glob(f"{split}-*.parquet"), *directory.glob(f"data/{split}-*.parquet")]
    if len(files) != 1:
        names = ", ".join(f"{split}{suffix}" for suffix in _SUFFIXES)
        raise UserError(f"{directory}: expected one of {names}, found {len(files)} of them")
    return files[0]


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
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _hub_data(source: str, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
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
