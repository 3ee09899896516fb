"""Samples laid out in rows, what they begin with in common standing there once."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from rmjax.models.inputs import Rows


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a micro-batch.

    Attributes:
      rows: rows computed at once, over all devices.
      length: token places of a row.
      slots: samples a row can hold.
      align: each part of a group, its beginning and each sample's rest, starts at a multiple of so
        many places, for kernels that need it. A beginning ends at such a multiple too.
    """

    rows: int
    length: int
    slots: int
    align: int = 1


class Group(NamedTuple):
    """Samples that stand together in a row.

    Attributes:
      samples: the tokens of each.
      shared: how many tokens all of them begin with, which then stand in the row once; fewer than
        the shortest has. 0 for a sample by itself.
    """

    samples: Sequence[Int32[np.ndarray, "..."]]
    shared: int = 0


def common_prefix(samples: Sequence[Int[np.ndarray, "..."]]) -> int:
    """How many tokens all of the samples begin with, leaving each a token of its own.

    Decided on tokens, not on text: a template or tokenizer may merge characters across the end of
    a prompt.
    """
    if len(samples) < 2:
        return 0
    first = samples[0]
    length = min(map(len, samples)) - 1
    for other in samples[1:]:
        differ = np.flatnonzero(first[:length] != other[:length])
        length = int(differ[0]) if len(differ) else length
    return length


def places(lengths: Sequence[int] | np.ndarray, shared: int, align: int) -> int:
    """Token places that a group takes in a row.

    Args:
      lengths: tokens of its samples.
      shared: how many of them all begin with.
      align: see `RowShape`.
    """
    shared = _aligned_prefix(len(lengths), shared, align)
    own = np.asarray(lengths, np.int64) - shared
    return shared + int((-(-own // align)).sum()) * align


def _aligned_prefix(samples: int, shared: int, align: int) -> int:
    return shared // align * align if samples > 1 else 0


def make_rows(rows: Sequence[Sequence[Group]], count: int, shape: RowShape) -> Rows:
    """Lays groups out one after the other in each of `count` rows, as numpy arrays.

    Args:
      rows: the groups of each row; rows beyond them are empty. Samples take the row's slots in the
        order in which they come.
      count: rows to make.
      shape: length, slots and alignment of a row.
    """
    made = np.zeros((5, count, shape.length), np.int32)
    tokens, segment_ids, positions, masked_start, masked_end = made
    last_token_index = np.zeros((count, shape.slots), np.int32)
    for row, groups in enumerate(rows):
        place = slot = 0
        for number, (samples, shared) in enumerate(groups, start=1):
            start = place
            shared = _aligned_prefix(len(samples), shared, shape.align)
            place = start + shared
            tokens[row, start:place] = samples[0][:shared]
            segment_ids[row, start:place] = number
            positions[row, start:place] = np.arange(shared)
            for sample in samples:
                end = place + len(sample) - shared
                tokens[row, place:end] = sample[shared:]
                segment_ids[row, place:end] = number
                positions[row, place:end] = np.arange(shared, len(sample))
                masked_start[row, place:end] = start + shared
                masked_end[row, place:end] = place
                last_token_index[row, slot] = end - 1
                slot += 1
                place = end + -end % shape.align
    return Rows(tokens, segment_ids, positions, masked_start, masked_end, last_token_index)  # pyright: ignore[reportArgumentType]
