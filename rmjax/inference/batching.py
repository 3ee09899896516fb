"""The batches in which data are scored.

A model is compiled for every shape of a batch. So a session of scoring has few shapes, the rungs of
a ladder, however many and however long its conversations are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rmjax.data.batches import Batches
from rmjax.data.packing import pack
from rmjax.data.planning import Row, group_length, plan_rows, prompt_groups, row_shape
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.models.attention.dispatch import alignment, computed_share, row_multiple
from rmjax.models.flops import model_flops
from rmjax.models.model import Model
from rmjax.models.parts import SMALLEST_PART

PADDED_TOKENS = 8192  # token positions computed at once, more or less
_ROW = 1024  # the row length that pairs are packed into
_SHORTEST_ROW = 64
# Row lengths of scoring; a fourth is what the model can read at most. The second is for sets:
# longer rows would need more memory, and shorter ones repeat prompts.
_SHORT, _BULK, _LONG = 512, 4096, 32768
_MOST_SLOTS = 1024  # samples that a row may hold
# What a step costs besides its places, in places: 64, and one for so many of a row, filled or not.
# Measured on a CPU, see docs/appendix.md.
_STEP, _OF_ROW = 64, 32
_TIGHT = 0.9  # a step that is filled so far stays as it is
_FEW = 4  # steps, of which every division is tried

Step = list[Row]


class _Planned(NamedTuple):
    """Steps with the rung of each, and what they cost, in places."""

    steps: list[tuple[int, Step]]
    cost: float


def scoring_batches(data: TokenizedData, model: Model, share: bool = True) -> list[Batches]:
    """Batches that hold every sample once, those of one shape together.

    **Shapes.** Rows are 512, 4,096, 32,768 or as many positions long as the model can read
    (`max_position_embeddings`, which is the third if it is below 32,768), one for each part of the
    mesh that has rows of its own. So whatever is scored, and however often, has at most four
    shapes. A single conversation takes the shortest that holds it. Conversations that are longer
    than the model's own limit, which only a run's `max_length` allows, have a shape for each of
    their longest.

    **Padding.** Where the model computes rows in parts (`ModelOptions.parts`), a batch has fewer
    than 32 places of padding, which is less than a tenth of any batch of 289 tokens or more. A
    smaller one is what a set has left over, or a small set. Elsewhere, which is on accelerators and
    on several devices, whole rows are computed, and what is left empty depends on the data: little
    of many conversations of many lengths, but up to half where all are a little longer than half a
    row, and most of it where they are few or one is much longer than the others, since there are
    but four shapes, and as many rows as the mesh has parts. A kernel's alignment adds its gaps.

    Of the divisions that are tried, the one with the fewest places is taken, where a step costs
    some by itself. So the responses to a prompt may stand in several rows, each with the prompt.

    Args:
      data: the samples.
      model: decides what rows its attention needs, and over how many devices they are spread.
      share: whether the prefix that the samples of a prompt share is computed once.
    """
    planner = _Planner(data, model, share)
    found = planner.cheapest(np.arange(len(data)), planner.top).steps
    steps_of: dict[int, list[Step]] = {}
    for rung, step in sorted(found, key=lambda item: item[0]):
        steps_of.setdefault(rung, []).append(step)
    return [Batches(data, steps, planner.shapes[n], share) for n, steps in steps_of.items()]


class _Planner:
    """Divides samples among the rungs.

    Attributes:
      shapes: of the rungs, up to the one that holds the longest sample.
      top: the rung to begin with.
    """

    def __init__(self, data: TokenizedData, model: Model, share: bool):
        options = model.options
        self._data, self._share, self._parts = data, share, options.parts
        self._skips = computed_share(options.attention) == 0.0
        # Of the time that a place takes, what attention adds for each of its row.
        self._attention = 0.0
        if not self._skips:
            llama, one = model.config, [(0, [1])]
            pair = 4 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim
            self._attention = pair / model_flops(llama, 0, one, training=False)
        multiple = math.lcm(SMALLEST_PART, row_multiple(options.attention, options.sharding))
        self.shapes: list[RowShape] = []
        longest = int(data.lengths.max())
        most = max(longest, model.config.max_position_embeddings)
        for length in (_SHORT, _BULK, min(_LONG, most), most):
            whole = -(-length // multiple) * multiple
            align = alignment(options.attention, whole)
            slots = min(_MOST_SLOTS, length // 8)
            self.shapes.append(RowShape(options.sharding.row_shards, whole, slots, align))
            if length >= max(longest, _BULK):
                break
        self.top = len(self.shapes) - 1

    def cheapest(self, samples: np.ndarray, rung: int) -> _Planned:
        """The best division found of samples, in ascending order, among rungs up to this one."""
        if not len(samples):
            return _Planned([], 0.0)
        whole = self._at(samples, rung)
        if rung == 0:
            return whole
        lower = self.shapes[rung - 1]
        short = -(-self._data.lengths // lower.align) * lower.align <= lower.length
        found = []
        above = rung > 1
        if not above or not short[samples].any():
            found.append(whole)
        if not above or self._skips:
            stay, go = [], []
            for planned in whole.steps:
                members = _samples(planned[1])
                kept = not short[members].all() or (not above and self._tight(planned))
                (stay if kept else go).append(planned)
            if go:
                rest = np.sort(np.concatenate([_samples(step) for _, step in go]))
                found.append(self._joined(stay, self.cheapest(rest, rung - 1)))
        if above or not self._skips or len(whole.steps) <= _FEW:
            long, rest = samples[~short[samples]], samples[short[samples]]
            if len(rest):
                stay = self._at(long, rung).steps if len(long) else []
                found.append(self._joined(stay, self.cheapest(rest, rung - 1)))
        return min(found, key=lambda planned: planned.cost)

    def _at(self, samples: np.ndarray, rung: int) -> _Planned:
        """All of them in rows of one rung."""
        shape = self.shapes[rung]
        groups, lengths = prompt_groups(self._data, samples, shape, self._share)
        rows = pack(lengths, shape.length, shape.slots, [len(group) for group in groups])
        made = [[groups[i] for i in row] for row in rows]
        steps = [(rung, made[i : i + shape.rows]) for i in range(0, len(made), shape.rows)]
        return _Planned(steps, sum(map(self._cost, steps)))

    def _joined(self, steps: Sequence[tuple[int, Step]], others: _Planned) -> _Planned:
        return _Planned([*steps, *others.steps], sum(map(self._cost, steps)) + others.cost)

    def _cost(self, planned: tuple[int, Step]) -> float:
        rung, step = planned
        shape = self.shapes[rung]
        computed = shape.length
        if self._parts:
            furthest = max(self._filled(row, shape.align) for row in step)
            computed = -(-furthest // SMALLEST_PART) * SMALLEST_PART
        computed *= 1 + self._attention * shape.length
        return shape.rows * (computed + _STEP + shape.length / _OF_ROW)

    def _tight(self, planned: tuple[int, Step]) -> bool:
        rung, step = planned
        shape = self.shapes[rung]
        filled = sum(self._filled(row, shape.align) for row in step)
        return filled >= _TIGHT * shape.rows * shape.length

    def _filled(self, row: Row, align: int) -> int:
        return sum(group_length(self._data, group, align, self._share) for group in row)


def _samples(step: Step) -> np.ndarray:
    return np.concatenate([group for row in step for group in row])


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
    align = alignment(model.options.attention, most)
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
