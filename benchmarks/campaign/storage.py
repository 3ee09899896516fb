"""Storage that fails: full, read-only, gone, torn, flipped; and clocks that jump.

A command must end in one clear line and a status other than 0, or not be harmed. Given again when
the storage is good, it must come to the same bits as one that was never disturbed. So nothing that
it had said to be saved is lost.
"""

import ctypes
import dataclasses
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from campaign import damage, forks, full_disks
from campaign.ledger import Row
from campaign.tries import Tries, at, one_line

PART = "storage"
_CAPABILITIES_VERSION, _CAP_DAC_OVERRIDE = 0x20080522, 1
_YEARS = 10 * 365 * 86400


def run(tries: Tries) -> list[Row]:
    """Tries every fault on every command, as far as the minutes go."""
    faults: list[Callable[[Tries], list[Row]]] = [
        lambda share: full_disks.run(share, PART),
        *[lambda share, fault=fault: _meanwhile(share, fault) for fault in _FAULTS],
        lambda share: damage.torn(share, PART),
        lambda share: damage.checkpoints(share, PART),
        lambda share: damage.caches(share, PART),
    ]
    rows = []
    for number, fault in enumerate(faults):
        now = time.monotonic()
        share = (tries.until - now) / (len(faults) - number)
        found = fault(dataclasses.replace(tries, until=now + share))
        rows += [row for row in found if row.tried or "not tried" in row.promise]
    return rows


@dataclasses.dataclass(frozen=True)
class _Fault:
    """What becomes of the storage while a command runs.

    Attributes:
      promise: in words.
      words: of which the command's line has some, if it ends in one.
      rounds: of all commands.
      harm: what is done to the directory meanwhile.
      prepare: what is done in the command's process before it begins, given when the harm comes.
      mend: what is done to the directory afterwards.
    """

    promise: str
    words: tuple[str, ...] = ()
    rounds: int = 3
    harm: Callable[[Path], object] = lambda directory: None
    prepare: Callable[[float], None] = lambda moment: None
    mend: Callable[[Path], object] = lambda directory: None


def _meanwhile(tries: Tries, fault: _Fault) -> list[Row]:
    """Does a fault to each command, and gives the command again."""
    row, log = Row(PART, fault.promise), tries.scratch / "log.txt"
    for name, victim in tries.each(fault.rounds):
        directory, moment = tries.fresh(name), tries.moment(name, 0.1, 0.95)
        ended = forks.run(
            victim.arguments,
            directory,
            when=at(moment, lambda process: fault.harm(directory)),  # noqa: B023
            prepare=lambda: fault.prepare(moment),  # noqa: B023
            log=log,
        )
        fault.mend(directory)
        wrong = one_line(ended, *fault.words) if ended.code != 0 else ""
        wrong = wrong or tries.again(name, directory, log)
        tries.count(row, f"{name} at {moment:.1f} s, status {ended.code}", wrong)
    return [row]


def _full_output(moment: float) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _modes(directory: Path, mode: int) -> None:
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir() and path.exists():
            path.chmod(mode)


def _obey_modes(moment: float) -> None:
    """Gives up what lets root write whatever a directory's mode says (capabilities(7))."""
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for number in (0, 1):  # effective, permitted
        data[number] &= ~(1 << _CAP_DAC_OVERRIDE)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _removed(directory: Path) -> None:
    """Moves what is in a directory away, and removes it there: at once for whoever writes it."""
    away = directory.with_name("away")
    away.mkdir()
    for number, path in enumerate(directory.iterdir()):
        path.rename(away / str(number))
    shutil.rmtree(away)


def _jumping(moment: float) -> None:
    """Puts the clock ten years forward or back at a moment."""
    now, began = time.time, time.monotonic()
    years = _YEARS if int(1000 * moment) % 2 else -_YEARS
    time.time = lambda: now() + years * (time.monotonic() - began > moment)


def _of_other_years(directory: Path) -> None:
    for path in directory.rglob("*"):
        then = time.time() + random.choice((-1, 1)) * _YEARS
        os.utime(path, (then, then))


_FAULTS = (
    _Fault("standard output to a full disk", ("the disk is full",), 1, prepare=_full_output),
    _Fault(
        "a directory that becomes read-only",
        ("cannot be",),
        harm=lambda directory: _modes(directory, 0o555),
        prepare=_obey_modes,
        mend=lambda directory: _modes(directory, 0o755),
    ),
    _Fault("a directory that vanishes", harm=_removed),
    _Fault(
        "clocks that jump",
        ("the clock was put forward",),
        prepare=_jumping,
        mend=_of_other_years,
    ),
)
