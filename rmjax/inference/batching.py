"""The batches in which data are scored.

A model is compiled for every shape of a batch. So there are few row lengths, and few numbers of
rows of each length.
"""

from collections import defaultdict

import numpy as np

from rmjax.data.batches import Batches
from rmjax.data.packing import pack
from rmjax.data.planning import Row, group_length, plan_rows, prompt_groups, row_shape
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.models.attention.dispatch import alignment, row_multiple
from rmjax.models.model import Model

PADDED_TOKENS = 8192  # token positions computed at once, more or less
_ROW = 1024  # the row length that short samples are packed into
_SHORTEST_ROW = 64
_SLOTS = 64  # samples that a row may hold


def scoring_batches(data: TokenizedData, model: Model, share: bool = True) -> list[Batches]:
    """Batches that hold every sample once, those of one shape together.

    Args:
      data: the samples.
      model: decides what rows its attention needs, and over how many devices they are spread.
      share: whether the prefix that the samples of a prompt share is computed once.
    """
    # Longer rows would waste attention where it cannot skip, shorter ones repeat prompts.
    longest = bucket(max(int(data.lengths.max()), _ROW), model)
    align = alignment(model.options.attention, longest)  # enough for shorter rows too
    shape = RowShape(1, longest, _SLOTS, align)
    groups, lengths = prompt_groups(data, np.arange(len(data)), shape, share)
    shards = model.options.sharding.row_shards
    shortest = bucket(min(_ROW, -(-sum(lengths) // shards)), model)

    def row_length(tokens: int) -> int:
        return max(shortest, bucket(tokens, model))

    rows_of: dict[int, list[Row]] = defaultdict(list)
    for row in pack(lengths, row_length, _SLOTS, [len(group) for group in groups]):
        rows_of[row_length(lengths[row[0]])].append([groups[i] for i in row])
    steps_of: dict[RowShape, list[list[Row]]] = defaultdict(list)
    for length, rows in sorted(rows_of.items()):
        most = _rows_at_once(length, model)
        for start in range(0, len(rows), most):
            step = rows[start : start + most]
            count = shards
            while count < len(step):
                count *= 2
            steps_of[RowShape(min(count, most), length, _SLOTS, align)].append(step)
    return [Batches(data, steps, shape, share) for shape, steps in steps_of.items()]


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
