"""Kills: a command is killed at a random moment, continued, and its result compared bit for bit.

Each is run undisturbed once; its result and its duration are what the others are held to. A killed
one is given again until it ends by itself. Moments are uniform over the duration, so that some fall
into a save.
"""

import os
import signal

from campaign import forks
from campaign.ledger import Row
from campaign.served import Load
from campaign.tries import Tries, at
from campaign.victims import SERVED


def run(tries: Tries) -> list[Row]:
    """Kills the victims in turn, until the minutes are over."""
    rows = {name: Row("kill -9", name) for name in (*tries.victims, SERVED)}
    load = Load(tries.scratch) if tries.served else None
    while not tries.over():
        for name, _ in tries.each(1):
            tries.count(rows[name], "killed", _killed(tries, name))
        if load is not None:
            tries.count(rows[SERVED], "killed", _killed_server(tries, load))
    return [row for row in rows.values() if row.tried]


def _killed(tries: Tries, name: str) -> str:
    """Kills a command once or twice and continues it; what went wrong, if anything did."""
    victim, directory = tries.victims[name], tries.fresh(name)
    for _ in range(tries.rng.randint(1, 2)):
        kill = at(tries.moment(name), lambda process: os.kill(process, signal.SIGKILL))
        forks.run(victim.arguments, directory, when=kill)
    return tries.again(name, directory)


def _killed_server(tries: Tries, load: Load) -> str:
    with load.served() as server:
        server.wait_for(tries.rng)
        server.signal(signal.SIGKILL)
        server.end()
        server.begin()
        return server.result()
