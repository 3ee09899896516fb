"""The directory of a conversion that is not finished, so that a kill loses little of it.

Beside the target `DST` stands `DST.partial` until all is done:

    journal.jsonl   a line for each slice that is done; locked while the conversion runs
    plan.json       what is converted into what; a conversion by another plan begins anew
    files/          config.json, tokenizer, ...: moved into model/ at the end, so that nothing
                    takes model/ for a model before
    model/          the weights; renamed to `DST` at the end
"""

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rmjax.checkpoints.model_files import JOURNAL
from rmjax.errors import UserError, differing, write_errors
from rmjax.runtime.files import append, lock_file, read_json, replace_file

_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """What the journal says of a slice: its source's checksum, and whether it was read back."""

    checksum: str
    verified: bool


class Journal:
    """An unfinished conversion, and what is done of it.

    Attributes:
      directory: `DST.partial`.
      records: what is done, by the slice's number.
      replaced: what differed in the plan of an earlier conversion that was given up for this one.
    """

    def __init__(self, directory: Path, final: Path, file: IO[bytes]):
        """Reads the records from the journal's open `file`."""
        self.directory, self._final, self._file = directory, final, file
        self.records: dict[int, Record] = {}
        self.replaced: list[str] = []
        self._lock = threading.Lock()
        file.seek(0)
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # empty, or cut short by a kill
                self._note(**json.loads(line))

    @property
    def model(self) -> Path:
        """Where the weights are written."""
        return self.directory / "model"

    def record(self, number: int, checksum: str | None, *, verified: bool = False) -> None:
        """Notes that a slice is written, or (None) that it has to be written again."""
        line = {"slice": number, "checksum": checksum, "verified": verified}
        with self._lock:
            # A new line first: a line that a kill cut short must not swallow this one.
            append(self._file, f"\n{json.dumps(line)}".encode())
            self._note(**line)

    def _note(self, slice: int, checksum: str | None, verified: bool) -> None:
        self.records.pop(slice, None)
        if checksum is not None:
            self.records[slice] = Record(checksum, verified)

    def begin(self, plan: dict[str, Any], prepare: Callable[[Path, Path], None]) -> None:
        """Continues what is there if it is by the same plan; else begins anew."""
        plan = json.loads(json.dumps(plan))
        file = self.directory / _PLAN
        before = read_json(file) if file.exists() else {}  # none: killed while it was prepared
        if before == plan and self.model.exists():
            return
        self.replaced = sorted(differing(before, plan)) if before else []
        self.records.clear()
        self._file.truncate(0)
        file.unlink(missing_ok=True)
        for directory in (self.directory / "files", self.model):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        prepare(self.directory / "files", self.model)
        replace_file(file, json.dumps(plan, indent=2).encode())

    def finish(self, complete: Callable[[Path], None]) -> None:
        """Makes the target of what is there, when every slice is verified.

        Args:
          complete: writes into `model/` what makes it a model.
        """
        complete(self.model)
        for file in (self.directory / "files").iterdir():
            file.replace(self.model / file.name)
        if self._final.exists():
            self._final.rmdir()
        self.model.rename(self._final)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def open_journal(
    dst: str, plan: dict[str, Any], prepare: Callable[[Path, Path], None]
) -> Iterator[Journal]:
    """Opens the unfinished conversion to `dst`, or begins it.

    Args:
      dst: the target; must not exist or be empty.
      plan: what is converted into what, in JSON's types; only the same plan is continued.
      prepare: fills `files/` and `model/` (its arguments) before the first slice.

    Raises:
      UserError: `dst` is there and not empty, or cannot be made; the disk is full; a conversion to
        it is running. After an error what is done stays, and the message says so.
    """
    final = check_target(dst)
    directory = final.with_name(final.name + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / JOURNAL).exists():
            raise UserError(f"{directory}: in the way, and no unfinished conversion; move it")
        opened = open(directory / JOURNAL, "a+b", buffering=0)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{directory}: cannot be created ({error.strerror})") from error
    with opened as file:
        if not lock_file(file):
            raise UserError(f"{directory}: a conversion to this target is running")
        journal = Journal(directory, final, file)
        try:
            with write_errors(str(final)):
                journal.begin(plan, prepare)
                yield journal
        except BaseException as error:
            _leave(journal, error)
            raise


def _leave(journal: Journal, error: BaseException) -> None:
    """After an error: removes what nothing has come of, or says how to go on."""
    if not journal.records:
        shutil.rmtree(journal.directory, ignore_errors=True)
        return
    kept = (
        f"what is done so far is kept in {journal.directory}: the same command continues it; to "
        "give it up, delete that directory"
    )
    if isinstance(error, UserError):
        raise UserError(f"{error}. {kept[0].upper()}{kept[1:]}") from error
    error.add_note(kept)


def check_target(dst: str) -> Path:
    """The path of a target; raises a `UserError` if it exists and is not empty."""
    final = Path(dst).expanduser().resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final}: already exists and is not empty; choose another target")
    if final.is_mount():
        raise UserError(f"{final}: a mount point, which cannot be replaced; name a directory in it")
    return final
