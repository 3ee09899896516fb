"""Which row samples what: the host's part of sampling, between chunks.

Rows stand in groups, and a group keeps the keys and values of several prompts, each once. A row
that is over gets the next sample of a prompt that its group keeps; else a prompt that no group has
yet; else, where other groups have more left to do than rows, a copy of one of theirs. What a sample
says does not depend on any of this.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from rmjax.generation.programs import CHUNK, RowStates, Shape


@dataclasses.dataclass
class Request:
    """A prompt with its samples.

    Attributes:
      number: of the prompt.
      key: on which its noise depends.
      tokens: of the prompt. All but the last are kept for all samples; each sample begins with
        reading the last one.
      limit: tokens of a sample, at most.
      waiting: numbers of the samples that no row has yet, the next one last.
    """

    number: int
    key: int
    tokens: Int32[np.ndarray, "L"]
    limit: int
    waiting: list[int]

    @property
    def places(self) -> int:
        """Of its tokens that are kept."""
        return len(self.tokens) - 1


@dataclasses.dataclass
class Resident:
    """A prompt that a group keeps, at places from `start` on, for so many running rows."""

    request: Request
    start: int
    rows: int = 0

    @property
    def end(self) -> int:
        """The place after its last one."""
        return self.start + self.request.places


@dataclasses.dataclass
class Running:
    """A sample that a row is making."""

    resident: Resident
    sample: int
    begun: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)


class Placement(NamedTuple):
    """A prompt whose keys and values are to be written at places of a group, from `start` on."""

    request: Request
    group: int
    start: int


class Schedule:
    """The rows of a cache and what they are doing.

    Attributes:
      rows: of each group, the sample that each row is making, or None.
      step: tokens that every row has read so far.
    """

    def __init__(self, requests: Sequence[Request], shape: Shape):
        self.shape, self.step = shape, 0
        self.rows: list[list[Running | None]] = [
            [None] * shape.members for _ in range(shape.groups)
        ]
        self._new = list(reversed(requests))  # that no group has yet; the next one is last
        self._residents: list[list[Resident]] = [[] for _ in range(shape.groups)]

    def running(self) -> Iterator[tuple[int, int, Running]]:
        """Group, row and sample of each row that is making one."""
        for group, rows in enumerate(self.rows):
            for row, running in enumerate(rows):
                if running is not None:
                    yield group, row, running

    def finish(self, group: int, row: int) -> None:
        """The row's sample is over."""
        running = self.rows[group][row]
        assert running is not None
        running.resident.rows -= 1
        self.rows[group][row] = None

    def fill(self) -> list[Placement]:
        """Gives every free row a sample, as far as there are any.

        Returns:
          The prompts that must be in the cache before the rows go on.
        """
        placements: list[Placement] = []
        # One prompt for each group in turn, so that a few prompts are spread over all groups.
        groups = list(range(self.shape.groups))
        while groups:
            groups = [group for group in groups if self._fill_once(group, placements)]
        return placements

    def _fill_once(self, group: int, placements: list[Placement]) -> bool:
        """Fills free rows from one prompt; whether there may be more to do."""
        free = [row for row, running in enumerate(self.rows[group]) if running is None]
        if not free:
            return False
        residents = self._residents[group]
        resident = next((r for r in residents if r.request.waiting), None)
        if resident is None:
            residents[:] = [r for r in residents if r.rows]
            request = self._next_request(group)
            if request is None:
                return False
            start = self._room(group, request.places)
            assert start is not None
            resident = Resident(request, start)
            residents.append(resident)
            placements.append(Placement(request, group, start))
        for row in free[: len(resident.request.waiting)]:
            sample = resident.request.waiting.pop()
            self.rows[group][row] = Running(resident, sample, self.step)
            resident.rows += 1
        return True

    def _next_request(self, group: int) -> Request | None:
        """A prompt that the group has room for: a new one, or one with many samples left."""
        fits = self._new and self._room(group, self._new[-1].places) is not None
        if fits:
            return self._new.pop()
        if self._new:
            return None  # it waits for this room
        elsewhere = [
            resident.request
            for residents in self._residents
            for resident in residents
            if resident.request.waiting and self._room(group, resident.request.places) is not None
        ]
        return max(elsewhere, key=lambda r: (len(r.waiting), -r.number), default=None)

    def _room(self, group: int, places: int) -> int | None:
        """The first place of so many free ones that follow each other."""
        start = 0
        for resident in sorted(self._residents[group], key=lambda r: r.start):
            if resident.start - start >= places:
                return start
            start = max(start, resident.end)
        return start if self.shape.places - start >= places else None

    def slots_needed(self) -> int:
        """Slots that the next chunk needs: no running row may overwrite what it still sees."""
        return max(
            min(running.resident.request.limit, self.step + CHUNK - running.begun)
            for _, _, running in self.running()
        )

    def states(self) -> RowStates:
        """What each row does next, as numpy arrays."""
        size = (self.shape.groups, self.shape.members)
        arrays: dict[str, np.ndarray] = {
            name: np.zeros(size, np.int32) for name in RowStates._fields
        }
        arrays["prompt_key"] = np.zeros(size, np.uint32)
        arrays["running"] = np.zeros(size, bool)
        for group, row, running in self.running():
            resident, count = running.resident, len(running.tokens)
            prompt = resident.request.tokens
            values = dict(
                token=running.tokens[-1] if count else prompt[-1],
                position=len(prompt) - 1 + count,
                count=count,
                limit=resident.request.limit,
                begun=running.begun,
                prompt_start=resident.start,
                prompt_end=resident.end,
                prompt_key=resident.request.key,
                sample=running.sample,
                running=True,
            )
            for name, value in values.items():
                arrays[name][group, row] = value
        return RowStates(**arrays)  # pyright: ignore[reportArgumentType]
