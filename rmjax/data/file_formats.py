"""Files of rows, by their suffix: JSON, CSV, parquet and Arrow, each row as it is written.

datasets and pyarrow take seconds to import and most files need neither, so pyarrow is imported
where it is used.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rmjax.errors import UserError
from rmjax.runtime.json_object import unique_keys

Fields = dict[str, Any]

# Columns of a CSV file that hold text even where all of it looks like numbers.
_TEXT = re.compile(
    r"(id|prompt|instruction|question|query|context|system|input|response|answer|completion|output"
    r"|chosen|rejected|text|messages|conversation|subset|source|domain)(_?[0-9a-z])?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?|NaN|nan", re.ASCII)
_LONGEST_LINE = 256 << 20  # bytes
# A compressed file that becomes so many times as large, and so large, was made to do harm.
_MOST_RATIO = 200
_LEAST_BOMB = 256 << 20
_BATCH_ROWS = 128  # of parquet that are decoded at once
_INDEX = re.compile(r"__index_level_\d+__")  # pandas' row numbers


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a file has, such as `.jsonl.gz`; empty for none of them."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def read_file(path: Path) -> Iterator[Fields]:
    """The rows of a file; its suffix is one of `SUFFIXES`.

    Raises:
      UserError: naming the file, and the row if there is one to blame.
    """
    kind, _, compression = suffix_of(path)[1:].partition(".")
    if kind in _BINARY:
        return _BINARY[kind](path)
    # A list may stand in one line, and be as long as its file is to be seen to be.
    longest = None if kind == "json" and not compression else _LONGEST_LINE
    return _TEXTS[kind](path, _Lines(path, compression, longest))


def arrow_rows(batches: Iterable[Any], where: str) -> Iterator[Fields]:
    """The rows of Arrow's record batches.

    A struct has all the keys that any row has, and null where a row lacks one: a tool call would
    get the arguments of all the others. So nulls of structs are left out, except in JSON texts,
    where they were written.

    Args:
      batches: of one table.
      where: what messages call it.

    Raises:
      UserError: a value cannot be read, or two columns have the same name.
    """
    with _arrow_errors(where):
        for batch in batches:
            batch.validate(full=True)  # else offsets that lie are read through, wherever they lead
            decoders = _decoders(batch.schema)
            columns = {
                name: _decoded_values(column.to_pylist(), decode)
                for (name, decode), column in zip(decoders.items(), batch.columns)
                if not _INDEX.fullmatch(name)
            }
            for row in zip(*columns.values()):
                yield dict(zip(columns, row))


def _decoded_values(values: list[Any], decode: Callable[[Any], Any] | None) -> list[Any]:
    return values if decode is None else [None if v is None else decode(v) for v in values]


def _decoders(fields: Iterable[Any]) -> dict[str, Callable[[Any], Any] | None]:
    """For each column, or each part of a struct, what `_decoder` says."""
    return unique_keys([(field.name, _decoder(field)) for field in fields])


def _decoder(field: Any) -> Callable[[Any], Any] | None:
    """What has to be done to a value that is not null; None for nothing."""
    import pyarrow.types as kinds

    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    lists += (kinds.is_list_view, kinds.is_large_list_view)
    metadata = field.metadata or {}
    named = getattr(field.type, "extension_name", "") or metadata.get(b"ARROW:extension:name", b"")
    if named in ("arrow.json", b"arrow.json"):  # how datasets keeps values of several types
        return _JSON.decode
    if kinds.is_struct(field.type):
        inner = _decoders(field.type)
        return lambda value: {
            key: decode(v) if (decode := inner[key]) else v
            for key, v in value.items()
            if v is not None
        }
    if any(is_list(field.type) for is_list in lists):
        decode = _decoder(field.type.value_field)
        if decode is not None:
            return lambda values: _decoded_values(values, decode)
    return None


def _parquet_rows(path: Path) -> Iterator[Fields]:
    from pyarrow import parquet

    with _arrow_errors(str(path)), parquet.ParquetFile(path) as table:
        batches = map(_without_dictionaries, table.iter_batches(_BATCH_ROWS))
        batches = _within_bounds(path, batches, lambda batch: batch.nbytes)
        yield from arrow_rows(batches, str(path))


def _without_dictionaries(batch: Any) -> Any:
    """A record batch with each text written out, so that its size is that of its rows."""
    import pyarrow as pa

    columns = [
        c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns
    ]
    fields = [field.with_type(c.type) for field, c in zip(batch.schema, columns)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _arrow_file_rows(path: Path) -> Iterator[Fields]:
    import pyarrow

    # Not mapped into memory: a file that is shorter than it says would end the process.
    with _arrow_errors(str(path)), pyarrow.OSFile(str(path)) as stream:
        magic = stream.read(6)
        stream.seek(0)
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(stream)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            yield from arrow_rows(batches, str(path))
        else:  # the streaming format, which datasets writes
            yield from arrow_rows(pyarrow.ipc.open_stream(stream), str(path))


@contextlib.contextmanager
def _arrow_errors(where: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error


class _Lines:
    """The lines of a text file, as often as they are asked for."""

    def __init__(self, path: Path, compression: str, longest: int | None):
        self.path, self.compression, self.longest = path, compression, longest

    def __iter__(self) -> Iterator[bytes]:
        try:
            with _opened(self.path, self.compression) as stream:
                lines = _lines(self.path, stream, self.longest)
                yield from _within_bounds(self.path, lines, len) if self.compression else lines
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error


def _lines(path: Path, stream: io.BufferedIOBase, longest: int | None) -> Iterator[bytes]:
    """The lines of a file; a `UserError` if one has more than `longest` bytes."""
    for number in itertools.count(1):
        line = stream.readline(-1 if longest is None else longest + 1)
        if longest is not None and len(line) > longest:
            raise UserError(f"{path} line {number}: longer than {longest >> 20} MiB, as no row is")
        if not line:
            return
        yield line


def _within_bounds(path: Path, parts: Iterable[Any], size: Callable[[Any], int]) -> Iterator[Any]:
    """The parts of a compressed file; a `UserError` if it is made to fill the memory."""
    total, most = 0, max(_LEAST_BOMB, _MOST_RATIO * path.stat().st_size)
    for part in parts:
        total += size(part)
        if total > most:
            raise UserError(
                f"{path}: holds more than {most >> 20:,} MiB, {_MOST_RATIO} times its size, which "
                "no conversations do; if you trust it, write it without compression, as .jsonl"
            )
        yield part


@contextlib.contextmanager
def _opened(path: Path, compression: str) -> Iterator[io.BufferedIOBase]:
    if compression == "zst":
        import pyarrow

        with (
            pyarrow.OSFile(str(path)) as file,
            pyarrow.CompressedInputStream(file, "zstd") as stream,
        ):
            yield io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]
    else:
        with (gzip.open if compression else open)(path, "rb") as stream:
            yield stream


# ---- JSON ----------------------------------------------------------------------------------------


_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)
# What stands around the entries of a list.
_OPEN = re.compile(r"\s*\[\s*", re.ASCII)
_COMMA = re.compile(r"\s*,\s*", re.ASCII)
_END = re.compile(r"\s*\]\s*\Z", re.ASCII)


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Fields]:
    # Line by line, each value as it is written. pyarrow and datasets guess a column's type from
    # its first block: a date-like text becomes a date, a 2.5 after 10 MB of whole numbers an error.
    for number, line in enumerate(filter(bytes.strip, lines), start=1):
        yield _parse_line(line, f"{path} row {number}")


def _parse_line(line: bytes, where: str) -> Fields:
    try:
        row = _JSON.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from error
    return _object(row, where)


def _object(row: Any, where: str) -> Fields:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _json_rows(path: Path, lines: Iterable[bytes]) -> Iterator[Fields]:
    """A list of objects, or JSON lines, which many programs call `.json` too."""
    rest = iter(lines)
    first = next((line for line in rest if line.removeprefix(codecs.BOM_UTF8).strip()), b"{}")
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            json.loads(first.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: expected a list of JSON objects, or one object a line ({error})"
            ) from error
        yield from _json_lines(path, lines)
        return
    try:
        text = b"".join([first, *rest]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from error
    yield from _listed_rows(path, text)


def _listed_rows(path: Path, text: str) -> Iterator[Fields]:
    """The objects of a list, one after the other, so that an error can name the row."""
    entry, number = _OPEN.match(text), 0
    if entry and _END.match(text, entry.end()):
        return
    while entry:
        number += 1
        where = f"{path} row {number}"
        try:
            row, end = _JSON.raw_decode(text, entry.end())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error})") from error
        yield _object(row, where)
        if _END.match(text, end):
            return
        entry = _COMMA.match(text, end)
    raise UserError(f"{path}: broken JSON after row {number} (neither ',' nor the list's end)")


# ---- CSV -----------------------------------------------------------------------------------------


def _csv_rows(path: Path, lines: Iterable[bytes]) -> Iterator[Fields]:
    """The rows behind a header. An empty cell is None.

    CSV does not say what is a number. A column holds numbers if most of its cells are numbers, as
    JSON writes them; its other cells stay text, so that an error can name them. In a column of text
    all cells stay text, and so they do in columns that are text by their name, such as `response`:
    answers may all be numbers. All cells count, so it takes two readings.
    """
    numbers: Counter[str] = Counter()  # by column, cells that are numbers less those that are not
    for cells in _csv_cells(path, lines):
        for name, cell in cells.items():
            if cell:
                numbers[name] += 1 if _NUMBER.fullmatch(cell) else -1
    numeric = {name for name, more in numbers.items() if more > 0 and not _TEXT.fullmatch(name)}
    for cells in _csv_cells(path, lines):
        yield {name: _value(cell, name in numeric) for name, cell in cells.items()}


def _value(cell: str, numeric: bool) -> str | float | None:
    if not (numeric and _NUMBER.fullmatch(cell)):
        return cell or None
    return int(cell) if cell.lstrip("+-").isdecimal() and len(cell) < 20 else float(cell)


def _csv_cells(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # else 128 KB, less than a long conversation
    reader = csv.reader(_decoded(path, lines), strict=True)
    header: list[str] = []
    for number in itertools.count():  # the header is no row
        where = f"{path} row {number}"
        try:
            cells = next(reader, None)
            while cells == []:  # a blank line
                cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: broken CSV ({error})") from error
        if cells is None:
            return
        if not number:
            header = cells
            if len(set(header)) < len(header):
                raise UserError(f"{path}: two columns of the header have the same name: {header}")
        elif len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
        else:
            # pandas writes its row numbers in a first column without a name.
            yield dict(zip(header, cells) if header[0] else zip(header[1:], cells[1:]))


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {number}: not UTF-8 (byte {error.start} of the line)"
            ) from error


_TEXTS = {"jsonl": _json_lines, "json": _json_rows, "csv": _csv_rows}
_BINARY = {"parquet": _parquet_rows, "arrow": _arrow_file_rows}
SUFFIXES = (
    *(f".{name}{compression}" for name in _TEXTS for compression in ("", ".gz", ".zst")),
    *(f".{name}" for name in _BINARY),
)
