"""Batches: which samples are in which step, and their arrays.

The plan of a whole run is computed before its first step from the seed alone, the same on every
process. A step's batch is then a pure function of its number, so that the data's position in a
checkpoint is one number, and any number of processes can continue what any other number began.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int

from rmjax.data.batch import BATCH_AXES, Batch, Pairs, Ratings, Targets
from rmjax.data.packing import pack
from rmjax.data.planning import Unit, unit_groups, unit_places, units
from rmjax.data.row_layout import RowShape, make_rows
from rmjax.data.tokenized import TokenizedData
from rmjax.runtime.sharding import Sharding, put

Row = list[Unit]


class Batches:
    """A run's batches by step, each made when asked for: `len` and `[step]`, as grain wants."""

    def __init__(
        self, data: TokenizedData, steps: Sequence[Sequence[Row]], shape: RowShape, share: bool
    ):
        """Takes the rows of each step; see `training_batches` and `evaluation_batches`."""
        self.data, self.shape, self.share = data, shape, share
        self._rows = steps
        most = max((len(rows) for rows in steps), default=1)
        self.microbatches = -(-most // shape.rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> Batch:
        """The arrays of a step, whole (every process makes them all; they are small)."""
        return make_batch(self.data, self._rows[step], self.shape, self.microbatches, self.share)

    def samples(self, step: int) -> np.ndarray:
        """The samples of a step, in the order of its rows."""
        return np.concatenate([unit for row in self._rows[step] for unit in row])

    def tokens(self, step: int) -> int:
        """Real tokens computed in a step, a shared beginning counted once."""
        found = (unit for row in self._rows[step] for unit in row)
        return sum(unit_places(self.data, unit, 1, self.share) for unit in found)

    def places(self, step: int) -> int:
        """Token places computed in a step, padding included."""
        used = -(-len(self._rows[step]) // self.shape.rows)
        return used * self.shape.rows * self.shape.length

    def position(self, steps: int) -> dict[str, Any]:
        """Where the data are after so many steps: part of a checkpoint."""
        return {
            "next_step": steps,
            "samples": sum(
                len(unit) for rows in self._rows[:steps] for row in rows for unit in row
            ),
            "data": self.data.key,
        }

    def describe(self, step: int) -> str:
        """Where a step's samples come from, for messages."""
        rows = sorted({int(self.data.rows[i]) for i in self.samples(step)})
        return f"{self.data.source} rows {', '.join(map(str, rows))}"


def training_batches(
    data: TokenizedData,
    plan: Sequence[np.ndarray],
    shape: RowShape,
    *,
    packing: bool = True,
    share: bool = True,
) -> Batches:
    """The batches of a plan of steps; see `plan_steps`."""
    return Batches(data, [_rows(data, step, shape, packing, share) for step in plan], shape, share)


def evaluation_batches(
    data: TokenizedData, shape: RowShape, *, packing: bool = True, share: bool = True
) -> Batches:
    """Every sample once, one micro-batch a step; the last one is padded with empty rows."""
    rows = _rows(data, np.arange(len(data)), shape, packing, share)
    steps = [rows[i : i + shape.rows] for i in range(0, len(rows), shape.rows)]
    return Batches(data, steps, shape, share)


def _rows(
    data: TokenizedData, samples: np.ndarray, shape: RowShape, packing: bool, share: bool
) -> list[Row]:
    found, taken = units(data, samples, shape, share)
    if not packing:
        return [[unit] for unit in found]
    packed = pack(taken, shape.length, shape.slots, [len(unit) for unit in found])
    return [[found[i] for i in row] for row in packed]


def make_batch(
    data: TokenizedData,
    rows: Sequence[Row],
    shape: RowShape,
    microbatches: int,
    share: bool = True,
) -> Batch:
    """Lays samples out in rows, and rows in micro-batches.

    Args:
      data: the samples.
      rows: the units of each row.
      shape: the shape of a micro-batch.
      microbatches: how many there are places for.
      share: whether a unit's samples share what they begin with.
    """
    count = microbatches * shape.rows
    samples = np.full((count, shape.slots), -1, np.int32)
    for number, row in enumerate(rows):
        members = np.concatenate(row)
        samples[number, : len(members)] = members

    groups = [[g for unit in row for g in unit_groups(data, unit, share)] for row in rows]
    laid = make_rows(groups, count, shape)

    def stack(array: np.ndarray) -> np.ndarray:
        return array.reshape(microbatches, shape.rows, *array.shape[1:])

    return Batch._make(
        [
            jax.tree.map(stack, laid),
            jax.tree.map(stack, make_targets(data, samples)),
            stack(samples),
            np.int32(-(-len(rows) // shape.rows)),
        ]
    )


def make_targets(data: TokenizedData, samples: Int[np.ndarray, "B S"]) -> Targets:
    """What the scores of slots are held against, as numpy arrays.

    Args:
      data: the samples.
      samples: which one each slot of a row holds, -1 for none; the two of a pair side by side.
    """
    labels = np.where(samples[..., None] >= 0, data.labels[samples], np.nan)
    present = ~np.isnan(labels)
    ratings = Ratings._make(
        [np.where(present, labels, 0).astype(np.float32), present.astype(np.float32)]
    )

    chosen = (samples >= 0) & data.chosen[samples]
    most = max(1, samples.shape[1] // 2)
    slots = np.argsort(~chosen, axis=1, kind="stable")[:, :most].astype(np.int32)
    there = np.take_along_axis(chosen, slots, axis=1)
    strengths = data.strengths[np.take_along_axis(samples, slots, axis=1)]
    pairs = Pairs._make(
        [
            np.where(there, slots, 0),
            np.where(there, slots + 1, 0),
            there.astype(np.float32),
            np.where(there, np.where(np.isnan(strengths), 1, strengths), 0).astype(np.float32),
        ]
    )
    return Targets(ratings, pairs)


def iterate(batches: Batches, start: int, sharding: Sharding) -> Iterator[Batch]:
    """Batches from step `start` on, made ahead by grain's threads and placed on the mesh."""
    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in steps.to_iter_dataset(options):
        yield put(batch, BATCH_AXES, sharding)
