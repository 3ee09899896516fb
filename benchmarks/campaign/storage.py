"""Storage that fails: full, read-only, gone, torn, flipped; and clocks that jump.

A command must end in one clear line and a status other than 0, or not be harmed. Given again when
the storage is good, it must come to the same bits as one that was never disturbed. So nothing that
it had said to be saved is lost.
"""

import ctypes
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from campaign import forks
from campaign.ledger import Row
from campaign.victims import TRAIN, Victim, fresh, is_there, made, undisturbed

_PART = "storage"
_CAPABILITIES_VERSION, _CAP_DAC_OVERRIDE = 0x20080522, 1
_YEARS = 10 * 365 * 86400
Whole = dict[str, tuple[dict[str, str], float]]


def run(
    seed: int,
    minutes: float,
    scratch: Path,
    show: Callable[[str], None],
    only: Collection[str] = (),
) -> list[Row]:
    """Tries every fault on every command, as far as the minutes go."""
    rng = random.Random(seed)
    victims = made(scratch, only)
    whole = undisturbed(scratch, victims)
    end = time.monotonic() + 60 * minutes
    faults = (_full, _full_output, _read_only, _gone, _torn, _damaged, _clocks)
    rows = []
    for number, fault in enumerate(faults):
        now = time.monotonic()
        until = now + (end - now) / (len(faults) - number)
        found = fault(scratch, victims, whole, rng, _Until(until, show))
        rows += [row for row in found if row.tried or "not tried" in row.promise]
    return rows


class _Until:
    """A time, and who is told of each try."""

    def __init__(self, until: float, show: Callable[[str], None]):
        self._until, self._show = until, show

    def over(self) -> bool:
        return time.monotonic() > self._until

    def count(self, row: Row, what: str, fault: str) -> None:
        row.count(f"{what}: {fault}" if fault else "")
        self._show(f"{'LOST' if fault else 'ok':<4} {row.promise}: {what} {fault}")


def one_line(ended: forks.Ended, *words: str) -> str:
    """What is wrong with how a command ended that could not go on; nothing if all is right."""
    lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    if ended.code != 1 or len(lines) != 1 or "Traceback" in ended.text:
        return f"status {ended.code}, {len(lines)} lines of error: {ended.text[-400:]!r}"
    if words and not any(word in lines[0] for word in words):
        return f"does not say {words}: {lines[0][:300]!r}"
    return ""


def same_again(victim: Victim, directory: Path, wanted: dict[str, str], log: Path) -> str:
    """Gives a command again; what is wrong with what comes of it."""
    ended = forks.run(victim.arguments, directory, log=log)
    if ended.code != 0 and not is_there(ended):
        return f"not continued, status {ended.code}: {ended.text[-400:]!r}"
    found = forks.call(victim.result, directory)
    if found == wanted:
        return ""
    return f"differs: {sorted(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))[:5]}"


# ---- full ----------------------------------------------------------------------------------------


def _full(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """Disks with less room than a command writes, so that each kind of file meets the end."""
    disk, log = scratch / "disk", scratch / "full.txt"
    disk.mkdir()
    if _mount(disk, "size=256m"):
        return [Row(_PART, "a full disk: not tried, since only root may mount a small one")]
    rows = {}
    usual = os.environ["RMJAX_CACHE"]
    try:
        for name in (
            *victims,
            *[f"{n}, its cache there" for n in ("training", "probing") if n in victims],
        ):
            victim = victims[name.split(",")[0]]
            needed, cached = _needed(victim, disk, log, "cache" in name)
            rows[name] = Row(_PART, f"a full disk: {name}")
            for share in [rng.random() for _ in range(4)]:
                if until.over():
                    break
                _empty(disk)
                room = int(share * needed) >> 12 << 12
                _mount(disk, f"remount,size={max(4096, room)}")
                os.environ["RMJAX_CACHE"] = str(disk / "cache") if cached else usual
                ended = forks.run(victim.arguments, disk, log=log)
                fault = ""
                if ended.code != 0:  # where it ended well, what it wrote meanwhile was the most
                    fault = one_line(ended, "the disk is full")
                _mount(disk, "remount,size=256m")
                fault = fault or same_again(victim, disk, whole_of(whole, name), log)
                what = f"{room:,} of {needed:,} bytes, status {ended.code}"
                until.count(rows[name], what, fault)
            os.environ["RMJAX_CACHE"] = usual
    finally:
        os.environ["RMJAX_CACHE"] = usual
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return list(rows.values())


def whole_of(whole: Whole, name: str) -> dict[str, str]:
    """What must come of a command, whose cache may be elsewhere."""
    return whole[name.split(",")[0]][0]


def _needed(victim: Victim, disk: Path, log: Path, cached: bool) -> tuple[int, bool]:
    """Bytes that an undisturbed command leaves on a disk; and whether its cache is there."""
    _empty(disk)
    if cached:
        os.environ["RMJAX_CACHE"] = str(disk / "cache")
    forks.run(victim.arguments, disk, log=log)
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, cached


def _mount(disk: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        return subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        return 1


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _full_output(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """What a command says goes to a disk that is full."""
    row = Row(_PART, "standard output to a full disk")
    for name, victim in victims.items():
        if until.over():
            break
        directory = fresh(scratch, name)
        errors = directory / "output.txt"

        def full() -> None:
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

        ended = forks.run(victim.arguments, directory, log=errors, prepare=full)
        fault = one_line(ended, "the disk is full") if ended.code != 0 else ""
        fault = fault or same_again(victim, directory, whole[name][0], errors)
        until.count(row, f"{name}, status {ended.code}", fault)
    return [row]


# ---- read-only, gone -----------------------------------------------------------------------------


def _read_only(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """The directory becomes read-only while the command runs."""
    row = Row(_PART, "a directory that becomes read-only")
    log = scratch / "read-only.txt"
    for name, victim in _each(victims, until):
        directory = fresh(scratch, name)
        moment = rng.uniform(0.1, 0.9) * whole[name][1]

        def closed(process: int, now: float) -> bool:
            if now < moment:  # noqa: B023
                return False
            _modes(directory, 0o555)  # noqa: B023
            return True

        ended = forks.run(victim.arguments, directory, when=closed, prepare=_obey_modes, log=log)
        _modes(directory, 0o755)
        fault = one_line(ended, "cannot be") if ended.code != 0 else ""
        fault = fault or same_again(victim, directory, whole[name][0], log)
        until.count(row, f"{name} at {moment:.1f} s, status {ended.code}", fault)
    return [row]


def _modes(directory: Path, mode: int) -> None:
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir() and path.exists():
            path.chmod(mode)


def _obey_modes() -> None:
    """Gives up what lets root write whatever a directory's mode says (capabilities(7))."""
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for number in (0, 1):  # effective, permitted
        data[number] &= ~(1 << _CAP_DAC_OVERRIDE)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _gone(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """What the command writes into is moved away while it runs."""
    row = Row(_PART, "a directory that vanishes")
    log = scratch / "gone.txt"
    for name, victim in _each(victims, until):
        directory, away = fresh(scratch, name), fresh(scratch, "away")
        moment = rng.uniform(0.1, 0.95) * whole[name][1]

        def moved(process: int, now: float) -> bool:
            if now < moment:  # noqa: B023
                return False
            for number, path in enumerate(directory.iterdir()):  # noqa: B023
                path.rename(away / str(number))  # noqa: B023
            for path in away.iterdir():  # noqa: B023
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return True

        ended = forks.run(victim.arguments, directory, when=moved, log=log)
        fault = one_line(ended) if ended.code != 0 else ""
        fault = fault or same_again(victim, directory, whole[name][0], log)
        until.count(row, f"{name} at {moment:.1f} s, status {ended.code}", fault)
    return [row]


def _each(victims: dict[str, Victim], until: _Until) -> Iterator[tuple[str, Victim]]:
    """The commands in turn, three times at most."""
    for _ in range(3):
        for name, victim in victims.items():
            if until.over():
                return
            yield name, victim


# ---- torn, damaged -------------------------------------------------------------------------------

_TAILS = (b'{"step": 3, "lo', b"\x00" * 40, b'{"key": "\xff\xfe', b"1", b'{"step": 24}')


def _torn(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """A killed command left a line that is not whole at the end of each of its files of lines."""
    row = Row(_PART, "torn last lines")
    tails = {name: rng.sample(_TAILS, len(_TAILS)) for name in victims}
    for name, victim in _each(victims, until):
        directory, tail = fresh(scratch, name), tails[name].pop()
        moment = rng.uniform(0.4, 0.9) * whole[name][1]
        if forks.run(victim.arguments, directory, when=_kill_at(moment)).code != -9:
            continue  # it had ended: nothing is torn
        lines = [p for p in directory.rglob("*.jsonl*") if p.is_file() and p.suffix != ".json"]
        lines = [path for path in lines if "rollouts" not in path.parts]  # replaced whole
        for path in lines:
            with open(path, "ab") as file:
                file.write(tail)
        if lines:
            fault = same_again(victim, directory, whole[name][0], directory / "output.txt")
            until.count(row, f"{name}: {tail[:20]!r} behind {[p.name for p in lines]}", fault)
    return [row]


def _kill_at(moment: float) -> Callable[[int, float], bool]:
    def when(process: int, now: float) -> bool:
        if now < moment:
            return False
        os.kill(process, 9)
        return True

    return when


def _damaged(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """Every kind of file of a run's last checkpoint, with a flipped bit or cut."""
    if "training" not in victims:
        return []
    half = fresh(scratch, "half")
    steps = TRAIN.index("--config.steps=24")
    forks.run([*TRAIN[:steps], "--config.steps=12", *TRAIN[steps + 1 :]], half)
    last = half / "out" / "checkpoints" / "12"
    files = sorted(str(p.relative_to(last)) for p in last.rglob("*") if p.is_file())
    rows = {what: Row(_PART, f"a checkpoint: a file {what}") for what in ("flipped", "cut")}
    rng.shuffle(files)
    training, log = victims["training"], scratch / "damaged.txt"
    for number, file in enumerate(files):
        for what, row in rows.items():
            if until.over():
                break
            directory = fresh(scratch, "damaged")
            shutil.copytree(half / "out", directory / "out")
            checkpoint = directory / "out" / "checkpoints" / "12"
            harm(checkpoint / file, what, rng)
            ended = forks.run(training.arguments, directory, log=log)
            fault = ""
            if ended.code != 0:
                fault = one_line(ended, "checkpoints/12: incomplete or damaged")
                fault = fault or ("" if "step 10" in ended.text else f"offers none: {ended.text}")
                shutil.rmtree(checkpoint)
            if ended.code == 0 or number % 4 == 0:
                fault = fault or same_again(training, directory, whole["training"][0], log)
            until.count(row, f"{_anonymous(file)}, status {ended.code}", fault)
    return list(rows.values())


def harm(path: Path, what: str, rng: random.Random) -> None:
    """Flips a bit of a file, or cuts it."""
    content = bytearray(path.read_bytes())
    if what == "cut":
        content = content[: len(content) // 2]
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _anonymous(file: str) -> str:
    return "/".join("..." if len(part) == 32 else part for part in Path(file).parts)


# ---- clocks --------------------------------------------------------------------------------------


def _clocks(
    scratch: Path, victims: dict[str, Victim], whole: Whole, rng: random.Random, until: _Until
) -> list[Row]:
    """Files of another decade, and a clock that jumps by ten years while the command runs."""
    row = Row(_PART, "clocks that jump")
    log = scratch / "clocks.txt"
    for name, victim in _each(victims, until):
        directory = fresh(scratch, name)
        years, moment = rng.choice((-1, 1)) * _YEARS, rng.uniform(0.1, 0.8) * whole[name][1]

        def jumping() -> None:
            now, began = time.time, time.monotonic()
            time.time = lambda: now() + years * (time.monotonic() - began > moment)  # noqa: B023

        ended = forks.run(victim.arguments, directory, prepare=jumping, log=log)
        fault = one_line(ended, "the clock was put forward") if ended.code != 0 else ""
        for path in directory.rglob("*"):
            then = time.time() + rng.choice((-1, 1)) * _YEARS
            os.utime(path, (then, then))
        fault = fault or same_again(victim, directory, whole[name][0], log)
        until.count(row, f"{name} at {moment:.1f} s, status {ended.code}", fault)
    return [row]
