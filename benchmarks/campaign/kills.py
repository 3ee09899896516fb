"""Kills: a command is killed at a random moment, continued, and its result compared bit for bit.

Each is run undisturbed once; its result and its duration are what the others are held to. A killed
one is given again until it ends by itself. Moments are uniform over the duration, so that some fall
into a save.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from campaign import forks
from campaign.ledger import Row
from campaign.served import served_load
from campaign.victims import Victim, fresh, is_there, made, undisturbed


def run(
    seed: int,
    minutes: float,
    scratch: Path,
    show: Callable[[str], None],
    only: Collection[str] = (),
) -> list[Row]:
    """Kills the victims in turn, until the minutes are over."""
    rng = random.Random(seed)
    victims = made(scratch, only)
    rows = {name: Row("kill -9", name) for name in victims}
    whole = undisturbed(scratch, victims)
    end = time.monotonic() + 60 * minutes
    served_row, served = Row("kill -9", "a served load"), served_load(scratch, rng, show)
    serving = not only or "a served load" in only
    while time.monotonic() < end:
        for name, victim in victims.items():
            wanted, seconds = whole[name]
            fault = _killed(victim, fresh(scratch, name), wanted, rng, seconds)
            rows[name].count(fault)
            show(f"{name}: {fault or 'the same to the bit'}")
        if serving:
            served_row.count(next(served))
    served.close()
    return [row for row in (*rows.values(), served_row) if row.tried]


def _killed(
    victim: Victim, directory: Path, wanted: dict[str, str], rng: random.Random, seconds: float
) -> str:
    """Kills a command once or twice and continues it; what went wrong, if anything did."""
    for _ in range(rng.randint(1, 2)):
        forks.run(victim.arguments, directory, when=_at(rng.random() * seconds, signal.SIGKILL))
    ended = forks.run(victim.arguments, directory)
    # It may have been killed at its very end, when the result had its name.
    if ended.code != 0 and not is_there(ended):
        return f"not continued: {ended.text.strip()[-300:]}"
    found = forks.call(victim.result, directory)
    if found == wanted:
        return ""
    return f"differs: {sorted(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))}"


def _at(moment: float, number: int) -> Callable[[int, float], bool]:
    """Sends a signal at a moment."""

    def when(process: int, now: float) -> bool:
        if now < moment:
            return False
        os.kill(process, number)
        return True

    return when
