"""The shapes of a run's rows, chosen from its data: those in which few places are computed.

A step computes whole micro-batches of rows of one length. What its samples leave empty is padding:
the ends of rows where nothing fits any more, the rest of the last row, the rows that the last
micro-batch has too many. Rows that are too short cut prompt groups, which then repeat what they
share; rows that are too long, or too many at once, stay empty. Which shape is best depends on how
long groups are and how many a step has, so the steps that a run plans are packed in many shapes.

Every shape is a program to compile. So there is one, unless it leaves too much empty: then others
join it, for the many steps without the longest sample, or for those that are fuller than most.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from rmjax.data.packing import pack
from rmjax.data.planning import longest_atom, plan_rows, prompt_groups, slots_of
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData

_LENGTHS = 32  # that are tried
_COUNTS = 8  # of rows at once, that are tried with each
_LONGEST = 16384  # of the lengths that are tried, unless a sample is longer
_FINENESS = 16  # lengths are multiples of it, whatever the kernel
_EMPTY = 0.14  # of what is computed, which is too much
_WORTH = 0.04  # of the cost, that another shape must save

ShapeOf = Callable[[int, int], RowShape]  # of rows at once, over all devices, and of a length


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What rows a run may have.

    Attributes:
      places: token positions computed at once on a row shard, at most; more only if a row needs it.
      least: likewise, at least, if there can be so few and a step needs as many: micro-batches cost
        something beside their places.
      shards: row shards of the mesh.
      multiple: of token positions that a row must have.
      attention: what one more place of a row costs each of its places, in places; 0 where
        attention skips what a place does not see.
    """

    places: int
    least: int
    shards: int
    multiple: int
    attention: float = 0.0

    def length(self, needed: int) -> int:
        """The shortest row with room for so many places."""
        unit = int(np.lcm(self.multiple, _FINENESS))
        return -(-needed // unit) * unit


def choose_shapes(
    data: TokenizedData,
    steps: Sequence[np.ndarray],
    longest: int,
    limits: RowLimits,
    shape_of: ShapeOf,
    *,
    packing: bool,
    share: bool,
    most: int = 3,
) -> tuple[RowShape, ...]:
    """The shapes in which `steps` cost least, the same wherever it is asked.

    Args:
      data: the samples.
      steps: those of each step; few of many will do.
      longest: token positions that a row must have.
      limits: what else rows must be.
      shape_of: makes the shape of so many rows of a length.
      packing: see `plan_rows`.
      share: likewise.
      most: shapes there may be.

    Returns:
      One shape or a few; everything fits in the first. A step takes that in which it computes the
      fewest places.
    """
    lengths = _lengths(limits.length(longest), limits)
    whole = shape_of(limits.shards, lengths[-1])
    groups = [prompt_groups(data, step, whole, share) for step in steps]
    needed = [longest_atom(data, step, whole.align, share) for step in steps]
    found: list[tuple[RowShape, np.ndarray]] = []  # shapes, and the places of each step
    for length in lengths:
        shape = shape_of(limits.shards, length)
        rows = np.asarray(
            [
                _rows_needed(data, step, of_step, shape, packing, share) if wanted <= length else 0
                for step, of_step, wanted in zip(steps, groups, needed)
            ]
        )
        for at_once in _rows_at_once(length, limits, -(-int(rows.max()) // limits.shards)):
            size = at_once * limits.shards
            places = -(-rows // size) * float(size * length)
            found.append((shape_of(size, length), np.where(rows > 0, places, np.inf)))

    def cost(shapes: Sequence[tuple[RowShape, Float64[np.ndarray, "S"]]]) -> float:
        places = np.stack([places for _, places in shapes])
        weights = np.asarray([1 + limits.attention * shape.length for shape, _ in shapes])
        taken = places.argmin(axis=0)
        return float((places.min(axis=0) * weights[taken]).sum())

    whole_data = [entry for entry in found if entry[0].length >= longest]
    best = min(([entry] for entry in whole_data), key=cost)
    filled = sum(sum(lengths) for _, lengths in groups)
    while len(best) < most:
        computed = np.stack([places for _, places in best]).min(axis=0).sum()
        firsts = whole_data if len(best) == 1 else best[:1]  # two are chosen together
        more = min(([first, *best[1:], last] for first in firsts for last in found), key=cost)
        if 1 - filled / computed <= _EMPTY or cost(more) > (1 - _WORTH) * cost(best):
            break
        best = more
    return tuple(shape for shape, _ in best)


def _rows_needed(
    data: TokenizedData,
    step: Int64[np.ndarray, "n"],
    groups: tuple[list[np.ndarray], list[int]],
    shape: RowShape,
    packing: bool,
    share: bool,
) -> int:
    """How many rows a step has, of which the groups are given that nothing has divided."""
    members, lengths = groups
    counts = [slots_of(data, group) for group in members]
    if max(lengths) <= shape.length and max(counts) <= shape.slots:  # nor does this shape
        return len(pack(lengths, shape.length, shape.slots, counts)) if packing else len(members)
    return len(plan_rows(data, step, shape, packing=packing, share=share))


def _rows_at_once(length: int, limits: RowLimits, needed: int) -> Iterator[int]:
    """Rows on a shard, that have as many places as they may; of many counts some.

    Never more than the fullest step needs, be they fewer places than the least.
    """
    most = max(1, min(limits.places // length, needed))
    least = min(most, -(-limits.least // length))
    yield from sorted({int(x) for x in np.linspace(least, most, _COUNTS)}, reverse=True)


def _lengths(longest: int, limits: RowLimits) -> list[int]:
    """Row lengths to try, in ascending order; from half of what everything fits in."""
    unit = limits.length(1)
    last = max(longest, min(limits.places, _LONGEST) // unit * unit)
    tried = np.linspace(max(unit, longest // 2), last, _LENGTHS)
    return sorted({int(x) // unit * unit for x in tried} | {longest, last})
