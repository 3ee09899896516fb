"""Segments laid out in rows, with the prefix that a segment's samples share standing there once."""

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
      length: token positions of a row.
      slots: samples a row can hold.
      align: segments, and the branches after their shared prefix, start at multiples of so many
        positions, for kernels that need it.
    """

    rows: int
    length: int
    slots: int
    align: int = 1


class Segment(NamedTuple):
    """Samples that have one segment id in a row.

    Attributes:
      samples: the tokens of each.
      shared: length of the prefix that all of them share, which then stands in the row once; less
        than the shortest sample's. 0 for a sample by itself.
    """

    samples: Sequence[Int32[np.ndarray, "..."]]
    shared: int = 0


def make_rows(rows: Sequence[Sequence[Segment]], count: int, shape: RowShape) -> Rows:
    """Lays segments out one after the other in each of `count` rows, as numpy arrays.

    Args:
      rows: the segments of each row; rows beyond them are empty. Samples take the row's slots in
        the order in which they come.
      count: rows to make.
      shape: length, slots and alignment of a row.
    """
    arrays = np.zeros((5, count, shape.length), np.int32)
    tokens, segment_ids, positions, masked_start, masked_end = arrays
    last_token_index = np.zeros((count, shape.slots), np.int32)
    for row, segments in enumerate(rows):
        begin = slot = 0
        for number, (samples, shared) in enumerate(segments, start=1):
            start = begin
            shared = _aligned_prefix(len(samples), shared, shape.align)
            begin = branches = start + shared
            tokens[row, start:begin] = samples[0][:shared]
            segment_ids[row, start:begin] = number
            positions[row, start:begin] = np.arange(shared)
            for sample in samples:
                end = begin + len(sample) - shared
                tokens[row, begin:end] = sample[shared:]
                segment_ids[row, begin:end] = number
                positions[row, begin:end] = np.arange(shared, len(sample))
                masked_start[row, begin:end] = branches
                masked_end[row, begin:end] = begin
                last_token_index[row, slot] = end - 1
                slot += 1
                begin = end + -end % shape.align
    return Rows(tokens, segment_ids, positions, masked_start, masked_end, last_token_index)  # pyright: ignore[reportArgumentType]


def own_places(rows: Rows, row: int, slot: int) -> slice:
    """Where in its row a sample stands, without the prefix that it shares."""
    last = int(rows.last_token_index[row, slot])
    return slice(int(rows.masked_end[row, last]), last + 1)


def segment_length(lengths: Sequence[int] | np.ndarray, shared: int, align: int) -> int:
    """Token positions that a segment takes in a row, the gaps of alignment included.

    Args:
      lengths: tokens of its samples.
      shared: how many of them are the prefix that all share.
      align: see `RowShape`.
    """
    shared = _aligned_prefix(len(lengths), shared, align)
    own = np.asarray(lengths, np.int64) - shared
    return shared + int((-(-own // align)).sum()) * align


def common_prefix(samples: Sequence[Int[np.ndarray, "..."]]) -> int:
    """Length of the longest prefix that all samples share and that leaves each a token of its own.

    It is decided on tokens, not on text: a template or tokenizer may merge characters across the
    end of a prompt.
    """
    if len(samples) < 2:
        return 0
    first = samples[0]
    length = min(map(len, samples)) - 1
    for other in samples[1:]:
        differ = np.flatnonzero(first[:length] != other[:length])
        length = int(differ[0]) if len(differ) else length
    return length


def _aligned_prefix(samples: int, shared: int, align: int) -> int:
    return shared // align * align if samples > 1 else 0
