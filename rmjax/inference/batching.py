"""The batches in which data are scored.

A model is compiled for every shape of a batch. So a session of scoring has few shapes, the rungs of
a ladder, however many and however long its conversations are.
"""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

from rmjax.data.batches import Batches
from rmjax.data.planning import group_length, plan_rows, row_shape
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData, in_memory
from rmjax.inference.planner import BULK, TIGHT, Planner, Step
from rmjax.models.attention.dispatch import alignment, computed_share, row_multiple
from rmjax.models.flops import pair_cost
from rmjax.models.model import Model
from rmjax.models.parts import SMALLEST_PART

PADDED_TOKENS = 8192  # token positions computed at once, more or less
_ROW = 1024  # the row length that pairs are packed into
_SHORTEST_ROW = 64
_SHAPES = 4  # of a session, at most
# Row lengths of scoring, between which is BULK; a fourth is the longest that may come.
_SHORT, _LONG = 512, 16384
_SET = 16  # conversations, to which rows are fitted where they are computed whole
_FINENESS = 8  # lengths tried between one and twice it
_TRIED = 256  # conversations for each row at once, more or less, with which they are tried
_NEARLY = 0.05  # of such a step, which rounding may add
_MOST_SLOTS = 1024  # samples that a row may hold


class ScoringShapes:
    """The shapes of a session of scoring, at most four whatever comes; and batches of them.

    **Where the model computes rows in parts** (`ModelOptions.parts`), rows are 512, 4,096 or 16,384
    positions long, or as long as the longest conversation that may come. What a row's end leaves
    empty is not computed, so a batch has fewer than 32 places of padding, which is less than a
    tenth of any batch of 289 tokens or more.

    **Elsewhere**, which is on accelerators and on several devices, whole rows are computed. So a
    shape is made when data come that need it, or that cost a tenth more without it: for sets as
    long as it is best for them, for fewer than 16 conversations one of the lengths above. Between
    a conversation and its row there must remain a limit, whatever came before. So lengths are such
    that shapes yet to be made can follow each other, up to the longest, in steps of a factor with
    which three would do; one of the four is free. For a model that reads 131,072 tokens the factor
    is 13, for 8,192 it is 5. The same calls make the same shapes, on every process.

    There are as many rows as the mesh has parts with rows of their own; what one row could hold is
    mostly padding there. A kernel's alignment adds its gaps.
    """

    def __init__(self, model: Model, longest: int):
        """Takes the longest conversation that may come, in tokens."""
        options = model.options
        self._model, self._parts = model, options.parts
        self._multiple = math.lcm(SMALLEST_PART, row_multiple(options.attention, options.sharding))
        # Of the time that a place takes, what attention adds for each of its row.
        self._attention = computed_share(options.attention) * pair_cost(model.config)
        self._longest = self._rounded(max(longest, BULK))
        self._shortest = self._rounded(_SHORTEST_ROW)
        factor = (self._longest / self._shortest) ** (1 / (_SHAPES - 1))
        self._factor = max(BULK / _SHORT, factor)
        self._settled = self._parts
        self._lengths = self._usual() if self._parts else []

    def batches(self, data: TokenizedData, share: bool = True) -> list[Batches]:
        """Batches that hold every sample once, those of one shape together.

        Of the divisions that are tried, the one with the fewest places is taken, where a step costs
        some by itself. So the responses to a prompt may stand in several rows, each with the
        prompt.

        Args:
          data: the samples.
          share: whether the prefix that the samples of a prompt share is computed once.
        """
        if not self._settled:
            self._make_lengths(data, share)
        planner = self._planner(data, share, self._lengths)
        steps_of: dict[int, list[Step]] = {}
        steps = planner.best().steps
        if self._parts:
            steps = planner.even(steps)
        for number, step in sorted(steps, key=lambda item: item[0]):
            steps_of.setdefault(number, []).append(step)
        return [Batches(data, steps, planner.shapes[n], share) for n, steps in steps_of.items()]

    def settle(self, spoken: bool) -> list[Batches]:
        """Fixes the shapes to those that are good for most, before any data come.

        Args:
          spoken: whether the model scores what the assistant says of a sample.

        Returns:
          A batch of each shape, with one sample of two tokens.
        """
        self._settled, self._lengths = True, self._usual()
        said = [np.asarray([False, True])] if spoken else None
        data, order = in_memory([np.zeros(2, np.int32)], [0], said)
        planner = self._planner(data, True, self._lengths)
        return [Batches(data, [[[order]]], shape, True) for shape in planner.shapes]

    def _make_lengths(self, data: TokenizedData, share: bool) -> None:
        """Adds what these data need, or what saves a tenth of their cost."""
        some, longest = self._some(data), int(data.lengths.max())
        cost = math.inf
        if self._lengths and self._lengths[-1] >= longest:
            planner = self._planner(data, share, self._lengths)
            found = planner.best(some)
            cost = found.cost
            if planner.tokens(found) >= TIGHT * cost:
                return
        while len(self._lengths) < _SHAPES:
            for tried in (self._fitted(data), self._dividing(longest)):
                tried = [lengths for lengths in tried if lengths[-1] >= longest]
                costs = [self._planner(data, share, lengths).best(some).cost for lengths in tried]
                if costs and min(costs) <= TIGHT * cost:
                    cost = min(costs)
                    self._lengths = tried[costs.index(cost)]
                    break
            else:
                return

    def _some(self, data: TokenizedData) -> np.ndarray:
        """Samples to try lengths with: of every so many prompts, and all if they are few."""
        each = -(-len(data) // (_TRIED * self._model.options.sharding.row_shards))
        return np.flatnonzero(data.prompt_ids % each == 0)

    def _fitted(self, data: TokenizedData) -> list[list[int]]:
        """The lengths with one that is good for data, and leaves enough to make."""
        wanted = self._usual()
        if len(data) >= _SET:
            longest = int(data.lengths.max())
            most = min(self._longest, max(BULK, longest * 5 // 4))
            steps = round(_FINENESS * math.log2(most / self._shortest))
            wanted = [longest, *(round(most / 2 ** (i / _FINENESS)) for i in range(steps + 1))]
        return [more for more in self._with(wanted) if self._missing(more) <= _SHAPES - len(more)]

    def _dividing(self, longest: int) -> list[list[int]]:
        """The lengths with the first that holds the longest of those that evenly divide its gap."""
        ends = [self._shortest, *self._lengths, self._longest]
        after = max(1, bisect.bisect_left(ends, min(longest, self._longest)))
        start, ratio = ends[after - 1], ends[after] / ends[after - 1]
        steps = self._steps(ends[after - 1], ends[after])
        lengths = [round(start * ratio ** (i / steps)) for i in range(1, steps + 1)]
        found = self._with([length for length in lengths if length >= longest] or [longest])
        room = len(self._lengths) < _SHAPES - 1 or self._lengths[-1] == self._longest
        return [more for more in found if room or more[-1] == self._longest][:1]

    def _with(self, wanted: Sequence[int]) -> list[list[int]]:
        """The lengths with each of those wanted."""
        further = {self._rounded(length) for length in wanted} - set(self._lengths)
        return [sorted([*self._lengths, length]) for length in sorted(further)]

    def _usual(self) -> list[int]:
        """The lengths that are good for most."""
        usual = {_SHORT, BULK, min(_LONG, self._longest), self._longest}
        return sorted({self._rounded(length) for length in usual})

    def _missing(self, lengths: list[int]) -> int:
        """How many shapes are yet to be made, so that lengths follow in steps of the factor."""
        ends = [self._shortest, *lengths, self._longest]
        between = sum(self._steps(*gap) - 1 for gap in itertools.pairwise(ends))
        return between + (lengths[-1] < self._longest)

    def _steps(self, before: int, after: int) -> int:
        """Of the factor, from one length to another."""
        return max(1, math.ceil(math.log(after / before, self._factor) - _NEARLY))

    def _planner(self, data: TokenizedData, share: bool, lengths: list[int]) -> Planner:
        options = self._model.options
        rows = options.sharding.row_shards
        shapes = [
            RowShape(
                rows,
                n,
                min(_MOST_SLOTS, n // 8),
                alignment(options.attention, n, self._model.config),
            )
            for n in lengths
        ]
        return Planner(data, shapes, share, self._parts, self._attention)

    def _rounded(self, length: int) -> int:
        """The shortest row that holds so many positions, at its own alignment."""
        length = -(-length // self._multiple) * self._multiple
        unit = math.lcm(
            self._multiple, alignment(self._model.options.attention, length, self._model.config)
        )
        return -(-length // unit) * unit


def evaluation_batches(
    data: TokenizedData, shape: RowShape, *, packing: bool = True, share: bool = True
) -> Batches:
    """Every sample once in rows of one shape, that of training; see `plan_rows` for the options."""
    rows = plan_rows(data, np.arange(len(data)), shape, packing=packing, share=share)
    steps = [rows[i : i + shape.rows] for i in range(0, len(rows), shape.rows)]
    return Batches(data, steps, shape, share)


def pair_batches(data: TokenizedData, model: Model) -> Batches:
    """Every preference pair once in rows of one length, which holds the longest of them."""
    # Enough for shorter rows too, as those that the pairs turn out to need.
    most = bucket(max(_ROW, 3 * int(data.lengths.max())), model)
    align = alignment(model.options.attention, most, model.config)
    pairs = np.arange(len(data)).reshape(-1, 2)
    longest = max(group_length(data, pair, align, share=True) for pair in pairs)
    length = bucket(max(_ROW, longest), model)
    rows = _rows_at_once(length, model)
    shape = row_shape(data, rows=rows, length=length, align=align)
    return evaluation_batches(data, shape)


def bucket(length: int, model: Model) -> int:
    """The row length for a sample of `length` tokens: a power of two, or halfway between two."""
    row = _SHORTEST_ROW
    while row < length:
        row = row * 3 // 2 if (row & (row - 1)) == 0 else row // 3 * 4
    multiple = row_multiple(model.options.attention, model.options.sharding)
    return -(-row // multiple) * multiple


def _rows_at_once(length: int, model: Model) -> int:
    shards = model.options.sharding.row_shards
    return shards * max(1, PADDED_TOKENS // (length * shards))
