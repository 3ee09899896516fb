"""A result of JSON lines, a row of a source each, which a kill does not lose.

OUT is OUT.partial until its last row is there. Beside it stands what it is made by, so that only
the same model, data and settings continue it.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rmjax.data.readers import Row
from rmjax.errors import UserError, write_errors
from rmjax.runtime.files import PARTIAL, append, lock_file, read_json, replace_file


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file that is being written; make one with `open_row_file`.

    Attributes:
      file: OUT.partial.
      before: how many rows were there already; whoever writes begins behind them.
    """

    file: IO[bytes]
    before: int

    def write(self, lines: Iterable[bytes]) -> None:
        """Adds whole rows, which a kill does not lose from then on."""
        with write_errors(self.file.name):
            append(self.file, b"".join(lines))

    def keep(self, rows: int) -> None:
        """Cuts off all but so many rows."""
        with write_errors(self.file.name):
            with open(self.file.name, "rb") as file:
                end = sum(map(len, itertools.islice(file, rows)))
            os.truncate(self.file.name, end)


@contextlib.contextmanager
def open_row_file(out: Path, made_by: dict[str, Any], together: int = 1) -> Iterator[RowFile]:
    """Opens a file to write, at its beginning or where a killed command left it.

    It gets its name at the end, unless something was raised.

    Args:
      out: the file; it must not exist.
      made_by: whatever decides what the file holds, in JSON's types.
      together: so many rows are made together, from the first one on. Of those that a kill left in
        part none is kept, where what is in a row depends on which are made with it.

    Raises:
      UserError: the file exists, or it was begun by something else.
    """
    partial = out.with_name(out.name + PARTIAL)
    check_new(out)
    with write_errors(str(partial)):
        file = open(partial, "ab", buffering=0)  # noqa: SIM115
    with file:
        _lock(file, partial)
        with write_errors(str(partial)):
            before = _continued(partial, made_by, together)
        yield RowFile(file, before)
        with write_errors(str(out)):
            partial.rename(out)
            _beside(partial).unlink()


def _lock(file: IO[bytes], partial: Path) -> None:
    """Raises a `UserError` if another command writes the file, or has just given it its name."""
    try:
        mine = lock_file(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
    except FileNotFoundError:
        mine = False
    if not mine:
        raise UserError(f"{partial}: another command is writing it; wait for it, or end it")


def check_new(out: Path) -> None:
    """Makes the directory of a file that is to be written.

    Raises:
      UserError: the file is there, and nothing is written over; or it cannot be written.
    """
    with write_errors(str(out)):
        if out.exists():
            raise UserError(f"{out}: is there already; name another file, or remove it")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"{out.parent}: a file, and no directory to write into") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent}: cannot be written; name a file in another directory")


def json_line(row: Row, fields: Mapping[str, Any], nulls: Counter[str]) -> bytes:
    """A row's line: these fields. NaN, which stands for nothing in tables, is null in JSON.

    Args:
      row: for messages.
      fields: of it.
      nulls: counts the fields in which NaN became null; see `said_nulls`.

    Raises:
      UserError: JSON has no such value.
    """
    try:
        try:
            text = _dumped(fields)
        except ValueError:  # for once; looking into each row would cost more than writing it
            plain = {name: _without_nan(value) for name, value in fields.items()}
            text = _dumped(plain)
            nulls.update(name for name, value in plain.items() if value != fields[name])
        return (text + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.where}: cannot be written as JSON ({error})") from error


def said_nulls(nulls: Counter[str]) -> list[str]:
    """What there is to say of these, in words."""
    counts = ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(nulls.items()))
    return [f"NaN is written as null: {counts}"] if nulls else []


def _dumped(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _beside(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _continued(partial: Path, made_by: dict[str, Any], together: int) -> int:
    """How many whole rows a partial file holds; what is behind them is cut off.

    Raises:
      UserError: something else began it.
    """
    if not partial.stat().st_size:  # it is new, or has nothing that anyone could miss
        replace_file(_beside(partial), json.dumps(made_by, indent=2).encode())
        return 0
    if not _beside(partial).exists():
        raise UserError(
            f"{partial}: nothing says what began it, since {_beside(partial).name} is not there; "
            "remove it to begin anew"
        )
    before = read_json(_beside(partial))
    if before != made_by:
        other = [name for name in {**before, **made_by} if before.get(name) != made_by.get(name)]
        raise UserError(
            f"{partial}: begun with other values of {', '.join(other)}; give the same command as "
            "then to end it, or remove it"
        )
    ends = [0]
    with open(partial, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    rows = (len(ends) - 1) // together * together
    os.truncate(partial, ends[rows])
    return rows


def _text(value: Any) -> str:
    """What tables have and JSON has not: a time becomes its text."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"there is a {type(value).__name__} in it")
