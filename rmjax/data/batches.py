"""Batches: which samples are in which step, and their arrays.

The plan of a whole run is computed before its first step from the seed alone, the same on every
process. A step's batch is then a pure function of its number, so that the data's position in a
checkpoint is one number, and any number of processes can continue what any other number began.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int64

from rmjax.data.packing import pack
from rmjax.data.tokenise import TokenizedData
from rmjax.rows import BATCH_AXES, Batch, Rows
from rmjax.sharding import Sharding

_SLOTS_MULTIPLE = 4


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a micro-batch.

    Attributes:
      rows: rows computed at once, over all devices.
      length: token places of a row.
      slots: samples a row can hold.
    """

    rows: int
    length: int
    slots: int


def row_shape(data: TokenizedData, *, rows: int, length: int, packing: bool) -> RowShape:
    """A row's shape for `data`: as many slots as short samples could ever make use of, nearly."""
    if not packing:
        return RowShape(rows, length, 1)
    slots = slots_for(length, float(data.lengths.mean()))
    return RowShape(rows, length, max(1, min(slots, length // max(1, int(data.lengths.min())))))


def slots_for(length: int, mean: float) -> int:
    """Slots of a row of `length` places for samples of `mean` tokens.

    Twice the mean fill is enough for all but runs of very short samples, which then start a new
    row; a slot costs little, but a hundred of them would not be free.
    """
    return int(np.ceil(2 * length / max(1.0, mean) / _SLOTS_MULTIPLE)) * _SLOTS_MULTIPLE


def epoch_order(data: TokenizedData, seed: int, epoch: int) -> list[Int64[np.ndarray, "..."]]:
    """The samples of each prompt, the prompts in this epoch's order."""
    groups = np.split(np.arange(len(data)), np.flatnonzero(np.diff(data.groups)) + 1)
    order = np.random.Generator(np.random.Philox([seed, epoch])).permutation(len(groups))
    return [groups[i] for i in order]


def plan_steps(
    data: TokenizedData, *, batch_size: int, seed: int, steps: int = 0, epochs: float = 0.0
) -> list[Int64[np.ndarray, "..."]]:
    """The samples of each step of a run.

    Prompts keep their responses together: a step takes prompts until the next one would exceed
    `batch_size` responses. Only a prompt with more responses than that is split. Epochs follow
    each other without a gap; with `epochs`, the last step holds what is left.

    Args:
      data: the samples.
      batch_size: responses a step, at most.
      seed: of the order.
      steps: how many steps; or
      epochs: how often to see the data, perhaps a fraction. The other is 0.
    """
    budget = round(epochs * len(data))
    plan: list[np.ndarray] = []
    batch: list[np.ndarray] = []
    filled = taken = epoch = 0
    while True:
        for group in epoch_order(data, seed, epoch):
            for part in np.split(group, range(batch_size, len(group), batch_size)):
                if filled + len(part) > batch_size:
                    plan.append(np.concatenate(batch))
                    batch, filled = [], 0
                if steps and len(plan) == steps:
                    return plan
                batch.append(part)
                filled += len(part)
                taken += len(part)
                if not steps and taken >= budget:
                    return [*plan, np.concatenate(batch)]
        epoch += 1


class Batches:
    """A run's batches by step, each made when asked for: `len` and `[step]`, as grain wants."""

    def __init__(self, data: TokenizedData, plan: Sequence[np.ndarray], shape: RowShape):
        self.data, self.plan, self.shape = data, plan, shape
        lengths = data.lengths
        self._rows = [pack(lengths[step].tolist(), shape.length, shape.slots) for step in plan]
        most = max((len(rows) for rows in self._rows), default=1)
        self.microbatches = -(-most // shape.rows)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Batch:
        """The arrays of a step, whole (every process makes them all; they are small)."""
        rows = [[int(self.plan[step][i]) for i in row] for row in self._rows[step]]
        return make_batch(self.data, rows, self.shape, self.microbatches)

    def tokens(self, step: int) -> int:
        """Real tokens of a step."""
        return int(self.data.lengths[self.plan[step]].sum())

    def places(self, step: int) -> int:
        """Token places computed in a step, padding included."""
        used = -(-len(self._rows[step]) // self.shape.rows)
        return used * self.shape.rows * self.shape.length

    def position(self, steps: int) -> dict[str, Any]:
        """Where the data are after so many steps: part of a checkpoint."""
        return {
            "next_step": steps,
            "samples": sum(len(samples) for samples in self.plan[:steps]),
            "data": self.data.key,
        }

    def describe(self, step: int) -> str:
        """Where a step's samples come from, for messages."""
        rows = sorted(int(self.data.rows[i]) for i in self.plan[step])
        return f"{self.data.source} rows {', '.join(map(str, rows))}"


def make_rows(rows: Sequence[Sequence[np.ndarray]], count: int, shape: RowShape) -> Rows:
    """Lays sequences of tokens out one after the other in each of `count` rows, as numpy arrays.

    Args:
      rows: the token sequences of each row; rows beyond them are empty.
      count: rows to make.
      shape: length and slots of a row.
    """
    tokens = np.zeros((count, shape.length), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    ends = np.zeros((count, shape.slots), np.int32)
    for row, members in enumerate(rows):
        start = 0
        for slot, sequence in enumerate(members):
            end = start + len(sequence)
            tokens[row, start:end] = sequence
            segments[row, start:end] = slot + 1
            positions[row, start:end] = np.arange(len(sequence))
            ends[row, slot] = end - 1
            start = end
    return Rows._make([tokens, segments, positions, ends])


def make_batch(
    data: TokenizedData, rows: Sequence[Sequence[int]], shape: RowShape, microbatches: int
) -> Batch:
    """Lays samples out in rows, and rows in micro-batches.

    Args:
      data: the samples.
      rows: the samples of each row.
      shape: the shape of a micro-batch.
      microbatches: how many there are places for.
    """
    count = microbatches * shape.rows
    samples = np.full((count, shape.slots), -1, np.int32)
    for row, members in enumerate(rows):
        samples[row, : len(members)] = members
    sequences = [[data.sequence(sample) for sample in members] for members in rows]
    labels = np.where(samples[..., None] >= 0, data.labels[samples], np.nan)
    present = ~np.isnan(labels)

    def stack(array: np.ndarray) -> np.ndarray:
        return array.reshape(microbatches, shape.rows, *array.shape[1:])

    return Batch._make(
        [
            jax.tree.map(stack, make_rows(sequences, count, shape)),
            stack(np.where(present, labels, 0).astype(np.float32)),
            stack(present.astype(np.float32)),
            stack(samples),
            np.int32(-(-len(rows) // shape.rows)),
        ]
    )


def evaluation_batches(data: TokenizedData, shape: RowShape) -> Batches:
    """Every sample once, one micro-batch a step; the last one is padded with empty rows."""
    rows = pack(data.lengths.tolist(), shape.length, shape.slots)
    chunks = [rows[i : i + shape.rows] for i in range(0, len(rows), shape.rows)]
    plan = [np.asarray([sample for row in chunk for sample in row]) for chunk in chunks]
    return Batches(data, plan, shape)


def put(batch: Any, axes: Any, sharding: Sharding) -> Any:
    """Places numpy arrays on the mesh; each process hands over only its own devices' shards."""

    def place(array: np.ndarray, names: tuple[str, ...]) -> jax.Array:
        return jax.make_array_from_callback(
            np.shape(array), sharding.activation(names), lambda index: np.asarray(array)[index]
        )

    return jax.tree.map(place, batch, axes, is_leaf=lambda x: isinstance(x, np.ndarray))


def iterate(batches: Batches, start: int, sharding: Sharding) -> Iterator[Batch]:
    """Batches from step `start` on, made ahead by grain's threads and placed on the mesh."""
    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in steps.to_iter_dataset(options):
        yield put(batch, BATCH_AXES, sharding)
