"""The directory of a conversion that is under way: continued after a kill, shared by processes.

Beside the target `DST` stands `DST.partial` until all is done:

    plan.json         what is converted into what, by which nobody continues anything else
    process-I.jsonl   what process I has finished, a line a part; locked while process I runs
    files/            config.json, tokenizer, ...: moved into model/ at the end, so that before
                      it nothing there can be taken for a model
    model/            the weights; renamed to `DST` at the end

It appears at once with everything in it but the weights, so processes that start together agree.
They need no word between them beyond these files: a process does every N-th part, and whichever
finds that all are done finishes.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rmjax.checkpoints.model_files import PLAN
from rmjax.errors import UserError, disk_errors


@dataclasses.dataclass(frozen=True)
class Share:
    """Which slices this process does: those whose number is `process` modulo `processes`."""

    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"process {self.process} of {self.processes}: they are numbered from 0 to one less "
                "than their number"
            )


@dataclasses.dataclass(frozen=True)
class Record:
    """What a journal says of a part: the checksum of its source, and whether it was read back."""

    checksum: str
    verified: bool


class Unfinished:
    """An unfinished conversion, and this process's journal in it."""

    def __init__(self, directory: Path, final: Path, journal: TextIO, dropped: list[str]):
        """`dropped` is what was other in the conversion that this one has replaced."""
        self.directory, self._final, self._journal = directory, final, journal
        self.dropped = dropped
        self._lock = threading.Lock()

    @property
    def model(self) -> Path:
        """Where the weights are written."""
        return self.directory / "model"

    def records(self) -> dict[int, Record]:
        """What all processes have finished so far, by the part's number."""
        lines: list[dict[str, Any]] = []
        for file in self.directory.glob("process-*.jsonl"):
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut short when its process was killed
                    lines.append(json.loads(line))
        found: dict[int, Record] = {}
        for line in sorted(lines, key=lambda line: line["time"]):
            found.pop(line["part"], None)
            if line["checksum"] is not None:
                found[line["part"]] = Record(line["checksum"], line["verified"])
        return found

    def record(self, part: int, checksum: str | None, *, verified: bool = False) -> None:
        """Notes that a part is written, or (None) that it has to be written again."""
        line = {"part": part, "checksum": checksum, "verified": verified, "time": time.time_ns()}
        with self._lock:
            # A new line first: a line that a kill cut short must not swallow this one.
            self._journal.write("\n" + json.dumps(line))
            self._journal.flush()

    def finish(self, slices: int, complete: Callable[[Path], None]) -> bool:
        """Makes the target of what is there, if all `slices` are verified; says whether it exists.

        Args:
          slices: how many the plan has.
          complete: writes into `model/` what makes it a model.
        """
        os.fsync(self._journal.fileno())
        try:
            plan = open(self.directory / PLAN, "r+b")  # noqa: SIM115  (closed below)
        except FileNotFoundError:  # another process has finished it
            return self._final.exists()
        with plan:
            fcntl.flock(plan, fcntl.LOCK_EX)  # of two that see all done, the second finds nothing
            if not self.model.exists():
                return self._final.exists()
            if sum(record.verified for record in self.records().values()) < slices:
                return False
            complete(self.model)
            for file in (self.directory / "files").iterdir():
                file.replace(self.model / file.name)
            if self._final.exists():
                self._final.rmdir()
            self.model.rename(self._final)
        shutil.rmtree(self.directory, ignore_errors=True)
        return True


@contextlib.contextmanager
def unfinished(
    dst: str, plan: dict[str, Any], prepare: Callable[[Path, Path], None], share: Share
) -> Iterator[Unfinished]:
    """Opens the unfinished conversion to `dst`, or begins it.

    An unfinished one by another plan is begun anew where this process is the only one.

    Args:
      dst: the target; must not exist or be empty.
      plan: what is converted into what, as JSON; only the same plan is continued.
      prepare: fills `files/` and `model/` (its arguments) before the first part.
      share: this process's.

    Raises:
      UserError: `dst` is there and not empty, or cannot be made; the disk is full; what is there
        is of another plan, or in use. After an error what is done stays, and the message says so.
    """
    final = check_target(dst)
    directory = final.with_name(final.name + ".partial")
    plan = json.loads(json.dumps(plan))
    with disk_errors(str(final)):
        dropped = _drop_other(directory, plan, share) if directory.exists() else []
        if not (directory / PLAN).exists():
            _begin(directory, plan, prepare)
            if different := _differences(directory, plan):  # another process was first
                _refuse_other(directory, different)
    with open(directory / f"process-{share.process}.jsonl", "a+", encoding="utf-8") as journal:
        if not _locked(journal):
            raise UserError(
                f"{directory}: process {share.process} of this conversion is running already"
            )
        under_way = Unfinished(directory, final, journal, dropped)
        try:
            with disk_errors(str(final)):
                yield under_way
        except BaseException as error:
            _leave(under_way, share, error)
            raise


def _leave(under_way: Unfinished, share: Share, error: BaseException) -> None:
    """After an error: removes what nothing has come of, or says how to go on."""
    directory = under_way.directory
    if share.processes == 1 and not under_way.records():
        shutil.rmtree(directory, ignore_errors=True)
        return
    kept = (
        f"what is done so far is kept in {directory}: the same command continues it; to give "
        "it up, delete that directory"
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


def _drop_other(directory: Path, plan: dict[str, Any], share: Share) -> list[str]:
    """Removes what is there if it is of another plan, and says in what; raises if it must stay."""
    if not (directory / PLAN).exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(f"{directory}: in the way, and no unfinished conversion; move it")
        return []
    different = _differences(directory, plan)
    if not different and (directory / "model").exists():
        return []
    if share.processes > 1:
        _refuse_other(directory, different)
    with contextlib.ExitStack() as stack:
        for file in directory.glob("process-*.jsonl"):
            if not _locked(stack.enter_context(open(file, "a+", encoding="utf-8"))):
                raise UserError(f"{directory}: another conversion to this target is running")
        shutil.rmtree(directory)
    return different


def _refuse_other(directory: Path, different: list[str]) -> None:
    raise UserError(
        f"{directory}: is of another conversion (other {', '.join(different) or 'target'}); delete "
        "it to begin anew"
    )


def _differences(directory: Path, plan: dict[str, Any]) -> list[str]:
    """What of the plan is not as in the one that is there."""
    try:
        found = json.loads((directory / PLAN).read_text())
    except ValueError:
        return ["plan"]
    return sorted(name for name in plan | found if plan.get(name) != found.get(name))


def _begin(directory: Path, plan: dict[str, Any], prepare: Callable[[Path, Path], None]) -> None:
    """Makes the directory, complete at once; if another process was first, its own is kept."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory}: cannot be created ({error.strerror})") from error
    try:
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it the user's alone
        (staging / "files").mkdir()
        (staging / "model").mkdir()
        prepare(staging / "files", staging / "model")
        (staging / PLAN).write_text(json.dumps(plan, indent=2))
        try:
            staging.rename(directory)
        except OSError:
            if not (directory / PLAN).exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _locked(file: TextIO) -> bool:
    """Locks a file for this process, if nobody else has it; closing it lets go."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
