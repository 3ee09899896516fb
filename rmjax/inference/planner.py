"""Which samples to score stand in which step, and in rows of which shape."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rmjax.data.packing import pack
from rmjax.data.planning import Row, group_length, prompt_groups
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.models.parts import SMALLEST_PART

# The row length for sets: longer rows would need more memory, and shorter ones repeat prompts.
BULK = 4096
TIGHT = 0.9  # a step that is filled so far stays as it is, and so do shapes that cost so little
# What a step costs besides its places, in places: 64, and one for so many of a row, filled or not.
# Measured on a CPU, see docs/benchmarks.md.
_STEP, _OF_ROW = 64, 32
_FEW = 4  # steps, of which every division is tried
# How fast a step is beside another one, and how much sooner both halves of a step must be done; see
# `in_flight`. Two of 4,096 places run at 0.7 of their speed, two of 1,000 at 0.6.
_BESIDE, _SOONER = 0.6, 0.95
_LEAST = 512  # of a half's cost; smaller products leave more of a core idle

Step = list[Row]


class _Planned(NamedTuple):
    """Steps with the shape of each, by number, and what they cost, in places."""

    steps: list[tuple[int, Step]]
    cost: float


class Planner:
    """Divides samples among shapes, of which the last holds the longest."""

    def __init__(
        self,
        data: TokenizedData,
        shapes: Sequence[RowShape],
        share: bool,
        parts: bool,
        attention: float,
    ):
        self.shapes = shapes
        self._data, self._share, self._parts, self._attention = data, share, parts, attention

    def best(self, samples: np.ndarray | None = None) -> _Planned:
        """The best division found of these samples, in ascending order, or of all."""
        samples = np.arange(len(self._data)) if samples is None else samples
        return self.cheapest(samples, len(self.shapes) - 1)

    def even(self, steps: Sequence[tuple[int, Step]]) -> list[tuple[int, Step]]:
        """The steps; of an odd number one is divided, if its halves at once are done sooner.

        It is for rows of which parts are computed, one a step.
        """
        if len(steps) % 2:
            for step in sorted(steps, key=self._cost, reverse=True):
                halves = self._halves(step)
                costs = sorted(map(self._cost, halves))
                together = costs[0] / _BESIDE + costs[-1] - costs[0]
                if costs[0] >= _LEAST and together <= _SOONER * self._cost(step):
                    return [*(other for other in steps if other is not step), *halves]
        return list(steps)

    def _halves(self, step: tuple[int, Step]) -> list[tuple[int, Step]]:
        """The prompt groups of a step's row in two steps, or the samples of its only group."""
        number, rows = step
        if len(rows) > 1:  # for several devices, which compute one step at a time
            return [step]
        row = rows[0]
        align = self.shapes[number].align
        units = row if len(row) > 1 else [row[0][i : i + 1] for i in range(len(row[0]))]
        lengths = [group_length(self._data, unit, align, self._share) for unit in units]
        members: list[list[int]] = [[], []]
        filled = [0, 0]
        for unit in sorted(range(len(units)), key=lambda unit: -lengths[unit]):
            lighter = filled.index(min(filled))
            members[lighter].append(unit)
            filled[lighter] += lengths[unit]
        if not members[1]:
            return [step]
        halves = [[units[unit] for unit in sorted(half)] for half in members]
        if len(row) == 1:
            halves = [[np.concatenate(half)] for half in halves]
        return [(number, [half]) for half in halves]

    def tokens(self, planned: _Planned) -> int:
        """How many there are, with the gaps of alignment."""
        return sum(
            self._filled(row, self.shapes[number].align)
            for number, step in planned.steps
            for row in step
        )

    def cheapest(self, samples: np.ndarray, last: int) -> _Planned:
        """The best division found of samples, in ascending order, among shapes up to this one."""
        if not len(samples):
            return _Planned([], 0.0)
        whole = self._at(samples, last)
        if last == 0:
            return whole
        lower, skips = self.shapes[last - 1], self._attention == 0
        short = -(-self._data.lengths // lower.align) * lower.align <= lower.length
        found = []
        long_rows = self.shapes[last].length > BULK  # for what needs them, and no more
        if not long_rows or not short[samples].any():
            found.append(whole)
        if not long_rows or skips:
            stay, go = [], []
            for planned in whole.steps:
                members = _samples(planned[1])
                kept = not short[members].all() or (not long_rows and self._tight(planned))
                (stay if kept else go).append(planned)
            if go:
                rest = np.sort(np.concatenate([_samples(step) for _, step in go]))
                found.append(self._joined(stay, self.cheapest(rest, last - 1)))
        if long_rows or not skips or len(whole.steps) <= _FEW:
            long, rest = samples[~short[samples]], samples[short[samples]]
            if len(rest):
                stay = self._at(long, last).steps if len(long) else []
                found.append(self._joined(stay, self.cheapest(rest, last - 1)))
        return min(found, key=lambda planned: planned.cost)

    def _at(self, samples: np.ndarray, number: int) -> _Planned:
        """All of them in rows of one shape."""
        shape = self.shapes[number]
        groups, lengths = prompt_groups(self._data, samples, shape, self._share)
        rows = pack(lengths, shape.length, shape.slots, [len(group) for group in groups])
        made = [[groups[i] for i in row] for row in rows]
        steps = [(number, made[i : i + shape.rows]) for i in range(0, len(made), shape.rows)]
        return _Planned(steps, sum(map(self._cost, steps)))

    def _joined(self, steps: Sequence[tuple[int, Step]], others: _Planned) -> _Planned:
        return _Planned([*steps, *others.steps], sum(map(self._cost, steps)) + others.cost)

    def _cost(self, planned: tuple[int, Step]) -> float:
        number, step = planned
        shape = self.shapes[number]
        computed = shape.length
        if self._parts:
            furthest = max(self._filled(row, shape.align) for row in step)
            computed = -(-furthest // SMALLEST_PART) * SMALLEST_PART
        computed *= 1 + self._attention * shape.length
        return shape.rows * (computed + _STEP + shape.length / _OF_ROW)

    def _tight(self, planned: tuple[int, Step]) -> bool:
        number, step = planned
        shape = self.shapes[number]
        filled = sum(self._filled(row, shape.align) for row in step)
        return filled >= TIGHT * shape.rows * shape.length

    def _filled(self, row: Row, align: int) -> int:
        return sum(group_length(self._data, group, align, self._share) for group in row)


def _samples(step: Step) -> np.ndarray:
    return np.concatenate([group for row in step for group in row])
