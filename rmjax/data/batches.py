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
from jaxtyping import Int, Int64

from rmjax.data.layout import Group, RowShape, make_rows, places
from rmjax.data.packing import pack
from rmjax.data.tokenise import TokenizedData
from rmjax.rows import BATCH_AXES, Batch, Pairs, Ratings, Targets
from rmjax.sharding import Sharding

_SLOTS_MULTIPLE = 4

Unit = np.ndarray  # samples that must stand in one row, in ascending order
Row = list[Unit]


def row_shape(
    data: TokenizedData,
    *,
    rows: int,
    length: int,
    packing: bool = True,
    share: bool = True,
    align: int = 1,
) -> RowShape:
    """A row's shape for `data`: as many slots as short samples could ever make use of, nearly."""
    together = data.samples_together
    if not packing:
        most = max(map(len, _siblings(data, np.arange(len(data)))))
        return RowShape(rows, length, max(together, most if share else 1), align)
    taken = data.lengths.sum() - (_spared(data) if share else 0)
    slots = slots_for(length, float(taken / len(data)))
    own = data.lengths - (data.shared if share else 0)
    fit = length // max(1, int(own.min()))
    return RowShape(rows, length, together * max(1, min(slots, fit) // together), align)


def _spared(data: TokenizedData) -> int:
    """Tokens that need no place of their own when all siblings share what they begin with."""
    first = np.diff(data.groups, prepend=-1) != 0
    return int(data.shared[~first].sum())


def slots_for(length: int, mean: float) -> int:
    """Slots of a row of `length` places for samples that take `mean` of them.

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
      batch_size: responses a step, at most; a multiple of the samples that stay together.
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


def _siblings(data: TokenizedData, samples: np.ndarray) -> list[np.ndarray]:
    """Runs of samples that follow each other and answer one prompt."""
    breaks = (np.diff(samples) != 1) | (np.diff(data.groups[samples]) != 0)
    return np.split(samples, np.flatnonzero(breaks) + 1)


def units(
    data: TokenizedData, samples: np.ndarray, shape: RowShape, share: bool
) -> tuple[list[Unit], list[int]]:
    """What stands in one row together, and the places it takes.

    Sharing, that is the responses to one prompt, or as many of them as fit in a row; else single
    samples, or the two of a pair.

    Args:
      data: the samples.
      samples: those of a step; siblings follow each other.
      shape: of the rows.
      share: whether siblings share what they begin with.

    Raises:
      ValueError: something that cannot be divided is longer than a row.
    """
    found: list[Unit] = []
    taken: list[int] = []
    for run in _siblings(data, samples):
        together = 2 if data.chosen[run[0]] else 1
        atoms = np.split(run, range(together, len(run), together))
        for i, atom in enumerate(atoms):
            if share and i and len(found[-1]) + together <= shape.slots:
                joined = np.concatenate([found[-1], atom])
                size = unit_places(data, joined, shape.align, share)
                if size <= shape.length:
                    found[-1], taken[-1] = joined, size
                    continue
            found.append(atom)
            taken.append(unit_places(data, atom, shape.align, share))
    return found, taken


def unit_places(data: TokenizedData, unit: Unit, align: int, share: bool) -> int:
    """Token places that the samples of a unit take in a row."""
    lengths = data.lengths[unit]
    if share:
        return places(lengths, int(data.shared[unit[0]]), align)
    return sum(places([length], 0, align) for length in lengths)


def unit_groups(data: TokenizedData, unit: Unit, share: bool) -> list[Group]:
    """How a unit's samples are laid out: as one group, or each by itself."""
    sequences = [data.sequence(sample) for sample in unit]
    if share:
        return [Group(sequences, int(data.shared[unit[0]]))]
    return [Group([sequence]) for sequence in sequences]


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
