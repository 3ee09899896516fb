"""The batches of a run, step by step, and their arrays.

The plan of a whole run is computed before its first step from the seed alone, the same on every
process. A step's batch is then a pure function of its number, so that the data's position in a
checkpoint is one number, and a run can be continued by another number of processes.

grain is imported when training starts: it takes seconds, and scoring does not need it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from rmjax.data.batch import (
    Batch,
    Pairs,
    PolicyTargets,
    Ratings,
    Responses,
    Rollouts,
    Targets,
    batch_axes,
)
from rmjax.data.planning import Row, group_length, longest_atom, make_segments, plan_rows
from rmjax.data.predicted import at_predecessors, predicting
from rmjax.data.row_layout import RowShape, make_rows, own_places
from rmjax.data.tokenized import REFERENCE, TokenizedData
from rmjax.models.inputs import Rows
from rmjax.runtime.sharding import Sharding, put


class Batches:
    """A run's batches by step, each made when asked for: `len` and `[step]`, as grain wants."""

    def __init__(
        self,
        data: TokenizedData,
        steps: Sequence[Sequence[Row]],
        shape: RowShape | Sequence[RowShape],
        share: bool,
        microbatches: int = 0,
    ):
        """Takes the rows of each step, for example those that `training_batches` plans.

        Each step has as many micro-batches as the largest of its shape needs, and at least as many
        as given. `shape` is that of all steps, or of each.
        """
        self.data, self.share = data, share
        self._rows = steps
        self._shapes = [shape] * len(steps) if isinstance(shape, RowShape) else list(shape)
        self._microbatches = dict.fromkeys(self._shapes, max(1, microbatches))
        for rows, of_step in zip(steps, self._shapes):
            needed = _microbatches(rows, of_step)
            self._microbatches[of_step] = max(self._microbatches[of_step], needed)

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        """The shapes that steps have, each a program to compile."""
        return tuple(self._microbatches)

    @property
    def shape(self) -> RowShape:
        """That of every step, where there is one."""
        (only,) = self._microbatches
        return only

    @property
    def microbatches(self) -> int:
        """The most that a step may have."""
        return max(self._microbatches.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> Batch:
        """The arrays of a step, whole (every process makes them all; they are small)."""
        shape = self._shapes[step]
        microbatches = self._microbatches[shape]
        return make_batch(self.data, self._rows[step], shape, microbatches, self.share)

    def samples(self, step: int) -> np.ndarray:
        """The samples of a step, in the order of its rows."""
        return np.concatenate([group for row in self._rows[step] for group in row])

    def tokens(self, step: int) -> int:
        """Real tokens computed in a step, a shared prefix counted once."""
        groups = (group for row in self._rows[step] for group in row)
        return sum(group_length(self.data, group, 1, self.share) for group in groups)

    def padded_tokens(self, step: int) -> int:
        """Token positions computed in a step, padding included."""
        return _places(self._rows[step], self._shapes[step])

    def position(self, steps: int) -> dict[str, Any]:
        """Where the data are after so many steps: part of a checkpoint."""
        return {
            "next_step": steps,
            "samples": sum(len(self.samples(step)) for step in range(len(self))[:steps]),
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
    *others: RowShape,
    packing: bool = True,
    share: bool = True,
) -> Batches:
    """The batches of a plan of steps, see `plan_steps`; and `plan_rows` for the options.

    Of several shapes a step has that in which it computes the fewest places. Everything must fit in
    `shape`.
    """
    steps, taken = [], []
    align = max(other.align for other in (shape, *others))
    for step in plan:
        longest = longest_atom(data, step, align, share) if others else 0
        fitting = [shape, *(other for other in others if longest <= other.length)]
        planned = [plan_rows(data, step, s, packing=packing, share=share) for s in fitting]
        places = [_places(rows, shape) for rows, shape in zip(planned, fitting)]
        best = int(np.argmin(places))
        steps.append(planned[best])
        taken.append(fitting[best])
    return Batches(data, steps, taken, share)


def _microbatches(rows: Sequence[Row], shape: RowShape) -> int:
    return -(-len(rows) // shape.rows)


def _places(rows: Sequence[Row], shape: RowShape) -> int:
    return _microbatches(rows, shape) * shape.rows * shape.length


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
      rows: the prompt groups of each row.
      shape: the shape of a micro-batch.
      microbatches: how many to make; those without rows are empty.
      share: whether the samples of a group share their prefix.

    Returns:
      A batch of numpy arrays. Where `data` knows what the assistant says, its targets are a
      policy's.
    """
    count = microbatches * shape.rows
    samples = np.full((count, shape.slots), -1, np.int32)
    for number, row in enumerate(rows):
        members = np.concatenate(row)
        samples[number, : len(members)] = members

    segments = [[s for group in row for s in make_segments(data, group, share)] for row in rows]

    def stack(array: np.ndarray) -> np.ndarray:
        return array.reshape(microbatches, shape.rows, *array.shape[1:])

    laid = make_rows(segments, count, shape)
    if data.spoken is None:
        targets = make_targets(data, samples)
    elif data.values is not None:
        targets = make_rollouts(data, samples, laid)
    else:
        targets = make_policy_targets(data, samples, predicting(data, samples, laid))
    return Batch._make(
        [
            jax.tree.map(stack, laid),
            jax.tree.map(stack, targets),
            stack(samples),
            np.int32(-(-len(rows) // shape.rows)),
        ]
    )


def make_targets(data: TokenizedData, samples: Int[np.ndarray, "B S"]) -> Targets:
    """What the scores of slots are compared with, as numpy arrays.

    Args:
      data: the samples.
      samples: the one that each slot of a row holds, -1 for none; the two of a pair side by side.
    """
    labels = np.where(samples[..., None] >= 0, data.labels[samples], np.nan)
    rated = ~np.isnan(labels)
    ratings = Ratings._make(
        [np.where(rated, labels, 0).astype(np.float32), rated.astype(np.float32)]
    )
    return Targets(ratings, _pairs(data, samples))


def make_policy_targets(
    data: TokenizedData, samples: Int[np.ndarray, "B S"], places: Bool[np.ndarray, "B L"]
) -> PolicyTargets:
    """What a policy learns from slots, as numpy arrays; see `make_targets`.

    Args:
      data: the samples, with `spoken`.
      samples: the one that each slot of a row holds, -1 for none; the two of a pair side by side.
      places: that predict a token of a response; see `predicting`.
    """
    there = samples >= 0
    lengths, reference = (np.zeros(samples.shape, np.float32) for _ in range(2))
    lengths[there] = [data.spoken_in(sample).sum() for sample in samples[there]]
    if REFERENCE in data.attributes:
        reference[there] = data.labels[samples[there], data.attributes.index(REFERENCE)]
    # Of a pair the chosen one, and of a tie neither.
    refused = np.concatenate([[False], data.chosen[:-1]]) | (data.chosen & (data.strengths == 0))
    imitated = (there & ~refused[samples]).astype(np.float32)
    responses: Any = (places, lengths, imitated, reference)
    return PolicyTargets(Responses._make(responses), _pairs(data, samples))


def make_rollouts(data: TokenizedData, samples: Int[np.ndarray, "B S"], rows: Rows) -> Rollouts:
    """What a policy or its critic learns from its own samples in rows, as numpy arrays.

    Args:
      data: the samples, with `spoken` and `values`.
      samples: the one that each slot of a row holds, -1 for none.
      rows: in which they stand, as numpy arrays.
    """
    assert data.values is not None
    slots = np.zeros(rows.tokens.shape, np.int32)
    for row, slot in np.argwhere(samples >= 0).tolist():
        slots[row, own_places(rows, row, slot)] = slot
    values = type(data.values)._make(
        at_predecessors(functools.partial(data.of_sample, x), samples, rows, np.float32)
        for x in data.values
    )
    targets: Any = (predicting(data, samples, rows), slots, values)
    return Rollouts._make(targets)


def _pairs(data: TokenizedData, samples: Int[np.ndarray, "B S"]) -> Pairs:
    chosen = (samples >= 0) & data.chosen[samples]
    most = max(1, samples.shape[1] // 2)
    slots = np.argsort(~chosen, axis=1, kind="stable")[:, :most].astype(np.int32)
    present = np.take_along_axis(chosen, slots, axis=1)
    strengths = data.strengths[np.take_along_axis(samples, slots, axis=1)]
    return Pairs._make(
        [
            np.where(present, slots, 0),
            np.where(present, slots + 1, 0),
            present.astype(np.float32),
            np.where(present, np.where(np.isnan(strengths), 1, strengths), 0).astype(np.float32),
        ]
    )


def iterate(batches: Batches, start: int, sharding: Sharding) -> Iterator[Batch]:
    """Batches from step `start` on, made ahead by grain's threads and placed on the mesh."""
    import grain

    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in steps.to_iter_dataset(options):
        yield put(batch, batch_axes(batch), sharding)
