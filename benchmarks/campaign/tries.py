"""What every part that disturbs commands has: the commands, their minutes, how a try is judged."""

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from campaign import forks, victims
from campaign.ledger import Row
from campaign.victims import SERVED, Victim


@dataclasses.dataclass(frozen=True)
class Tries:
    """The commands of a part, each run undisturbed once, and the time that is left for them.

    Attributes:
      scratch: a directory.
      rng: what decides moments and faults.
      victims: the commands, by what they do.
      served: whether a served load is one of them.
      whole: what comes of each that nothing happens to, and in how many seconds.
      until: when to end, by `time.monotonic`.
      show: is told of each try.
    """

    scratch: Path
    rng: random.Random
    victims: dict[str, Victim]
    served: bool
    whole: dict[str, tuple[dict[str, str], float]]
    until: float
    show: Callable[[str], None]

    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.until

    def each(self, most: int = 1 << 30) -> Iterator[tuple[str, Victim]]:
        """The commands in turn, so often at most, until the time is over."""
        for _ in range(most if self.victims else 0):
            for name, victim in self.victims.items():
                if self.over():
                    return
                yield name, victim

    def fresh(self, name: str) -> Path:
        """An empty directory of this name."""
        return victims.fresh(self.scratch, name)

    def moment(self, name: str, least: float = 0.0, most: float = 1.0) -> float:
        """Seconds into a command: any, between two shares of what it takes undisturbed."""
        return self.rng.uniform(least, most) * self.whole[name][1]

    def count(self, row: Row, what: str, fault: str) -> None:
        """Counts a try, and tells of it."""
        row.count(f"{what}: {fault}" if fault else "")
        self.show(f"{'LOST' if fault else 'ok':<4} {row.promise}: {what} {fault}")

    def again(self, name: str, directory: Path, log: Path | None = None) -> str:
        """Gives a command again, undisturbed; what is wrong with what comes of it."""
        victim, wanted = self.victims[name], self.whole[name][0]
        ended = forks.run(victim.arguments, directory, log=log)
        # The first may have ended when it was disturbed, and its result had its name.
        if ended.code != 0 and not victims.is_there(ended):
            return f"not continued, status {ended.code}: {ended.text.strip()[-400:]!r}"
        found = forks.call(victim.result, directory)
        if found == wanted:
            return ""
        names = sorted(k for k in {**found, **wanted} if found.get(k) != wanted.get(k))
        return f"differs: {names[:5]} of {len(names)}"


def prepared(
    seed: int,
    minutes: float,
    scratch: Path,
    show: Callable[[str], None],
    only: Collection[str] = (),
) -> Tries:
    """Makes the commands and runs each undisturbed; the minutes begin then.

    Args:
      seed: of moments and faults.
      minutes: that the tries have.
      scratch: a directory.
      show: is told of each try.
      only: which commands; all if empty.
    """
    made = victims.made(scratch, only)
    whole = victims.undisturbed(scratch, made)
    served = not only or SERVED in only
    until = time.monotonic() + 60 * minutes
    return Tries(scratch, random.Random(seed), made, served, whole, until, show)


def at(moment: float, act: Callable[[int], object]) -> Callable[[int, float], bool]:
    """For `forks.run`: does something to a process at a moment, once."""

    def when(process: int, now: float) -> bool:
        if now < moment:
            return False
        act(process)
        return True

    return when


def one_line(ended: forks.Ended, *words: str) -> str:
    """What is wrong with how a command ended that could not go on; nothing if all is right."""
    lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    if ended.code != 1 or len(lines) != 1 or "Traceback" in ended.text:
        return f"status {ended.code}, {len(lines)} lines of error: {ended.text[-400:]!r}"
    if words and not any(word in lines[0] for word in words):
        return f"does not say {words}: {lines[0][:300]!r}"
    return ""
