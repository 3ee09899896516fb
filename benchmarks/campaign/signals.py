"""Signals, and a second command on the same files: the first one ends well, or says why not."""

import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from campaign import forks
from campaign.ledger import Row
from campaign.victims import Victim, fresh, is_there, made, undisturbed

_PART = "signals"
# By promise, the signals, and with which status a command may end beside 0.
_SENT: dict[str, tuple[list[int], tuple[int, ...]]] = {
    "Ctrl-C": ([signal.SIGINT], (130,)),
    "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], (-signal.SIGTERM,)),
    "SIGSTOP and SIGCONT": ([signal.SIGSTOP, signal.SIGCONT], ()),
}
_BETWEEN = 0.2  # seconds between two signals


def run(
    seed: int,
    minutes: float,
    scratch: Path,
    show: Callable[[str], None],
    only: Collection[str] = (),
) -> list[Row]:
    """Sends each signal to each command in turn, until the minutes are over."""
    rng = random.Random(seed)
    victims = made(scratch, only)
    whole = undisturbed(scratch, victims)
    end = time.monotonic() + 60 * minutes
    rows = {(p, name): Row(_PART, f"{p}: {name}") for name in victims for p in [*_SENT, "two"]}
    for name in victims:
        rows["two", name].promise = f"two at once: {name}"
    while time.monotonic() < end:
        for name, victim in victims.items():
            wanted, seconds = whole[name]
            for promise, (sent, codes) in _SENT.items():
                moment = rng.random() * seconds
                fault = _sent(victim, fresh(scratch, name), wanted, moment, sent, codes)
                rows[promise, name].count(f"at {moment:.2f} s: {fault}" if fault else "")
                show(f"{'LOST' if fault else 'ok':<4} {promise}: {name} at {moment:.2f} s {fault}")
            fault = _twice(victim, scratch, name, wanted, rng.random() * seconds)
            rows["two", name].count(fault)
            show(f"{'LOST' if fault else 'ok':<4} two at once: {name} {fault}")
            if time.monotonic() > end:
                break
    return [row for row in rows.values() if row.tried]


def _sent(
    victim: Victim,
    directory: Path,
    wanted: dict[str, str],
    moment: float,
    sent: list[int],
    codes: tuple[int, ...],
) -> str:
    """Sends signals to a command and continues it; what went wrong, if anything did."""
    left = [*sent]

    def when(process: int, now: float) -> bool:
        if now < moment + _BETWEEN * (len(sent) - len(left)):
            return False
        os.kill(process, left.pop(0))
        return not left

    ended = forks.run(victim.arguments, directory, when=when)
    said = [line for line in ended.text.splitlines() if line.startswith("interrupted")]
    if ended.code not in (*codes, 0):
        return f"status {ended.code}: {ended.text[-300:]!r}"
    if "Traceback" in ended.text or "Exception ignored" in ended.text:
        return f"a traceback: {ended.text[-300:]!r}"
    if ended.code == 130 and len(said) != 1:
        return f"{len(said)} lines: {ended.text[-300:]!r}"
    return _continued(victim, directory, wanted)


def _continued(victim: Victim, directory: Path, wanted: dict[str, str]) -> str:
    again = forks.run(victim.arguments, directory)
    if again.code != 0 and not is_there(again):
        return f"not continued: {again.text[-300:]!r}"
    found = forks.call(victim.result, directory)
    return "" if found == wanted else "not the same bits"


def _twice(victim: Victim, scratch: Path, name: str, wanted: dict[str, str], moment: float) -> str:
    """Gives a command again while it runs; the first must end well, the second well or in a line.

    Either may be the one that is refused, where the second was faster.
    """
    directory, logs = fresh(scratch, name), fresh(scratch, "logs")
    second: list[int] = []

    def when(process: int, now: float) -> bool:
        if now < moment:
            return False
        second.append(forks.start(victim.arguments, directory, logs / "second.txt"))
        return True

    first = forks.run(victim.arguments, directory, when=when, log=logs / "first.txt")
    codes = [first.code]
    if second:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(second[0], 0)[1]))
    texts = [first.text, (logs / "second.txt").read_text() if second else ""]
    refused = [text for code, text in zip(codes, texts) if code == 1]
    if 0 not in codes or not {*codes} <= {0, 1}:
        return f"status {codes}: {[text[-200:] for text in texts]!r}"
    if any("Traceback" in text or text.count("error: ") != 1 for text in refused):
        return f"no line: {refused[0][-300:]!r}"
    return _continued(victim, directory, wanted)
