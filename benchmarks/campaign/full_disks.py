"""Disks with less room than a command writes, so that each kind of file meets the end."""

import os
import shutil
import subprocess
from pathlib import Path

from campaign import forks
from campaign.ledger import Row
from campaign.tries import Tries, one_line
from campaign.victims import Victim

_CACHE_THERE = ", its cache there"
_CACHING = ("training", "probing")  # whose cache may be on the disk, too
_ROUNDS = 4


def run(tries: Tries, part: str) -> list[Row]:
    """Gives each command a disk that becomes full, and then one that has room."""
    disk = tries.scratch / "disk"
    disk.mkdir()
    if _mount(disk, "size=256m"):
        return [Row(part, "a full disk: not tried, since only root may mount a small one")]
    names = [f"{n}{_CACHE_THERE}" for n in _CACHING if n in tries.victims] + [*tries.victims]
    rows = {name: Row(part, f"a full disk: {name}") for name in names}
    usual = os.environ["RMJAX_CACHE"]
    needed: dict[str, int] = {}
    try:
        for name in [*names] * _ROUNDS:
            if tries.over():
                break
            os.environ["RMJAX_CACHE"] = str(disk / "cache") if _CACHE_THERE in name else usual
            victim = tries.victims[name.removesuffix(_CACHE_THERE)]
            if name not in needed:
                needed[name] = _needed(victim, disk, tries.scratch / "full.txt")
            room = int(tries.rng.random() * needed[name]) >> 12 << 12
            status, fault = _filled(tries, name, disk, room)
            what = f"{room:,} of {needed[name]:,} bytes, status {status}"
            tries.count(rows[name], what, fault)
    finally:
        os.environ["RMJAX_CACHE"] = usual
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return [*rows.values()]


def _filled(tries: Tries, name: str, disk: Path, room: int) -> tuple[int | None, str]:
    """Runs a command on a disk of a size, and again on a larger one: its status, and any fault."""
    name, log = name.removesuffix(_CACHE_THERE), tries.scratch / "full.txt"
    _empty(disk)
    _mount(disk, f"remount,size={max(4096, room)}")
    ended = forks.run(tries.victims[name].arguments, disk, log=log)
    fault = ""
    if ended.code != 0:  # where it ended well, what it wrote meanwhile was the most
        fault = one_line(ended, "the disk is full")
    _mount(disk, "remount,size=256m")
    return ended.code, fault or tries.again(name, disk, log)


def _needed(victim: Victim, disk: Path, log: Path) -> int:
    """Bytes that an undisturbed command leaves on a disk."""
    _empty(disk)
    forks.run(victim.arguments, disk, log=log)
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _mount(disk: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        return subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        return 1


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
