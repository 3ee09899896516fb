"""Files that are torn, flipped or cut: what a kill left, of a checkpoint, and of the caches."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from campaign import forks
from campaign.ledger import Row
from campaign.tries import Tries, at, one_line
from campaign.victims import TRAIN

_TAILS = (b'{"step": 3, "lo', b"\x00" * 40, b'{"key": "\xff\xfe', b"1", b'{"step": 24}')
_HARMS = ("flipped", "cut")
_CACHING = ("training", "probing")


def torn(tries: Tries, part: str) -> list[Row]:
    """A killed command left a line that is not whole at the end of each of its files of lines."""
    row = Row(part, "torn last lines")
    tails = {name: tries.rng.sample(_TAILS, len(_TAILS)) for name in tries.victims}
    for name, victim in tries.each(3):
        directory, tail = tries.fresh(name), tails[name].pop()
        kill = at(tries.moment(name, 0.4, 0.9), lambda process: os.kill(process, 9))
        if forks.run(victim.arguments, directory, when=kill).code != -9:
            continue  # it had ended: nothing is torn
        lines = [p for p in directory.rglob("*.jsonl*") if p.is_file() and p.suffix != ".json"]
        lines = [path for path in lines if "rollouts" not in path.parts]  # replaced whole
        for path in lines:
            with open(path, "ab") as file:
                file.write(tail)
        if lines:
            fault = tries.again(name, directory, directory / "output.txt")
            tries.count(row, f"{name}: {tail[:20]!r} behind {[p.name for p in lines]}", fault)
    return [row]


def checkpoints(tries: Tries, part: str) -> list[Row]:
    """Every file of a run's last checkpoint, with a flipped bit and cut."""
    rows = {what: Row(part, f"a checkpoint: a file {what}") for what in _HARMS}
    if "training" not in tries.victims:
        return []
    half, log = tries.fresh("half"), tries.scratch / "damaged.txt"
    steps = TRAIN.index("--config.steps=24")
    forks.run([*TRAIN[:steps], "--config.steps=12", *TRAIN[steps + 1 :]], half)
    checkpoint = Path("out", "checkpoints", "12")
    for number, (file, what) in enumerate(_harms(tries, half / checkpoint)):
        directory = _copied(tries, half, checkpoint / file, what)
        ended = forks.run(tries.victims["training"].arguments, directory, log=log)
        fault = ""
        if ended.code != 0:
            fault = one_line(ended, f"{checkpoint}: incomplete or damaged")
            fault = fault or ("" if "step 10" in ended.text else f"offers none: {ended.text}")
            shutil.rmtree(directory / checkpoint)
        if ended.code == 0 or number % 4 == 0:
            fault = fault or tries.again("training", directory, log)
        tries.count(rows[what], f"{_anonymous(file)}, status {ended.code}", fault)
    return list(rows.values())


def caches(tries: Tries, part: str) -> list[Row]:
    """Every file of a cache, with a flipped bit and cut: nothing else comes of it."""
    rows, usual = [], os.environ["RMJAX_CACHE"]
    for name in _CACHING:
        if name not in tries.victims:
            continue
        whole, log = tries.fresh("whole"), tries.scratch / "caches.txt"
        arguments = tries.victims[name].arguments
        own = {what: Row(part, f"a cache of {name}: a file {what}") for what in _HARMS}
        rows += own.values()
        try:
            os.environ["RMJAX_CACHE"] = str(whole / "cache")
            forks.run(arguments, whole, log=log)
            shutil.rmtree(whole / "out")
            for file, what in _harms(tries, whole / "cache"):
                directory = _copied(tries, whole, Path("cache", file), what)
                os.environ["RMJAX_CACHE"] = str(directory / "cache")
                ended = forks.run(arguments, directory, log=log)
                fault = one_line(ended, "delete it") if ended.code != 0 else ""
                if ended.code != 0:
                    shutil.rmtree(directory / "cache")
                fault = fault or tries.again(name, directory, log)
                tries.count(own[what], f"{_anonymous(file)}, status {ended.code}", fault)
        finally:
            os.environ["RMJAX_CACHE"] = usual
    return rows


def _harms(tries: Tries, directory: Path) -> Iterator[tuple[str, str]]:
    """Every file of a directory with every harm, as far as the time goes."""
    files = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    tries.rng.shuffle(files)
    for file in files:
        for what in _HARMS:
            if tries.over():
                tries.show(f"not all of {len(files)} files")
                return
            yield file, what


def _copied(tries: Tries, whole: Path, file: Path, what: str) -> Path:
    """A copy of a directory, one of whose files is harmed."""
    directory = tries.fresh("damaged")
    shutil.copytree(whole, directory, dirs_exist_ok=True)
    _harm(directory / file, what, tries.rng)
    return directory


def _harm(path: Path, what: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if what == "cut":
        content = content[: len(content) // 2]
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _anonymous(file: str) -> str:
    return "/".join("..." if len(part) == 32 else part for part in Path(file).parts)
