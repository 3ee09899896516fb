"""The batches of a run, step by step, and their arrays.

The plan of a whole run is computed before its first step from the seed alone, the same on every
process. A step's batch is then a pure function of its number, so that the data's position in a
checkpoint is one number, and a run can be continued by another number of processes.

grain is imported when training starts: it takes seconds, and scoring does not need it.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

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
from rmjax.data.planning import (
    PlannedRows,
    Row,
    distinct,
    group_length,
    longest_atom,
    make_segments,
    packed,
    plan_rows,
)
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
        steps: Iterable[Sequence[Row] | PlannedRows],
        shape: RowShape | Sequence[RowShape],
        share: bool,
        microbatches: int = 0,
    ):
        """Takes the rows of each step, for example those that `training_batches` plans.

        Each step has as many micro-batches as the largest of its shape needs, and at least as many
        as given. `shape` is that of all steps, or of each.
        """
        self.data, self.share = data, share
        self._steps = [step if isinstance(step, PlannedRows) else packed(step) for step in steps]
        self._shapes = [shape] * len(self._steps) if isinstance(shape, RowShape) else list(shape)
        self._microbatches = dict.fromkeys(self._shapes, max(1, microbatches))
        self._pairs = {shape: max(1, shape.slots // 2) for shape in self._shapes}
        for step, of_step in zip(self._steps, self._shapes):
            needed = _microbatches(step.rows, of_step)
            self._microbatches[of_step] = max(self._microbatches[of_step], needed)
            self._pairs[of_step] = max(self._pairs[of_step], _most_pairs(data, step))

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
        return len(self._steps)

    def __getitem__(self, step: int) -> Batch:
        """The arrays of a step, whole (every process makes them all; they are small)."""
        shape = self._shapes[step]
        microbatches, pairs = self._microbatches[shape], self._pairs[shape]
        return make_batch(
            self.data, self._steps[step].unpacked(), shape, microbatches, self.share, pairs
        )

    def samples(self, step: int) -> np.ndarray:
        """The samples of a step, in the order of its rows."""
        return self._steps[step].samples.astype(np.int64)

    def computed(self, step: int) -> np.ndarray:
        """The samples of a step that are computed, in the order of its slots; see `distinct`."""
        groups = (group for row in self._steps[step].unpacked() for group in row)
        return np.concatenate([distinct(self.data, group)[0] for group in groups])

    def tokens(self, step: int) -> int:
        """Real tokens computed in a step, a shared prefix counted once."""
        groups = (group for row in self._steps[step].unpacked() for group in row)
        return sum(group_length(self.data, group, 1, self.share) for group in groups)

    def padded_tokens(self, step: int) -> int:
        """Token positions computed in a step, padding included."""
        return _places(self._steps[step].rows, self._shapes[step])

    def position(self, steps: int) -> dict[str, Any]:
        """Where the data are after so many steps: part of a checkpoint."""
        return {
            "next_step": steps,
            "samples": sum(len(step.samples) for step in self._steps[:steps]),
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
        steps.append(packed(planned[best]))
        taken.append(fitting[best])
    return Batches(data, steps, taken, share)


def _most_pairs(data: TokenizedData, step: PlannedRows) -> int:
    """The most pairs that a row has."""
    row_of_group = np.repeat(np.arange(len(step.rows)), step.rows)
    row_of_sample = np.repeat(row_of_group, step.groups)
    return int(np.bincount(row_of_sample, data.chosen[step.samples]).max(initial=0))


def _microbatches(rows: Sized, shape: RowShape) -> int:
    return -(-len(rows) // shape.rows)


def _places(rows: Sized, shape: RowShape) -> int:
    return _microbatches(rows, shape) * shape.rows * shape.length


def make_batch(
    data: TokenizedData,
    rows: Sequence[Row],
    shape: RowShape,
    microbatches: int,
    share: bool = True,
    pairs: int = 0,
) -> Batch:
    """Lays samples out in rows, and rows in micro-batches.

    Args:
      data: the samples.
      rows: the prompt groups of each row.
      shape: the shape of a micro-batch.
      microbatches: how many to make; those without rows are empty.
      share: whether the samples of a group share their prefix.
      pairs: a row has room for so many, or for more if one of these has more.

    Returns:
      A batch of numpy arrays. Where `data` knows what the assistant says, its targets are a
      policy's.
    """
    count, pairs = microbatches * shape.rows, max(1, pairs, _most_pairs(data, packed(rows)))
    samples = np.full((count, shape.slots), -1, np.int32)
    members: list[Members] = []
    for number, row in enumerate(rows):
        slots, begin = [], 0
        for group in row:
            computed, which = distinct(data, group)
            samples[number, begin : begin + len(computed)] = computed
            slots.append(begin + which)
            begin += len(computed)
        members.append(Members(np.concatenate(row), np.concatenate(slots)))

    segments = [[s for group in row for s in make_segments(data, group, share)] for row in rows]

    def stack(array: np.ndarray) -> np.ndarray:
        return array.reshape(microbatches, shape.rows, *array.shape[1:])

    laid = make_rows(segments, count, shape)
    if data.spoken is None:
        targets = make_targets(data, samples, members, pairs)
    elif data.values is not None:
        targets = make_rollouts(data, samples, laid)
    else:
        places = predicting(data, samples, laid)
        targets = make_policy_targets(data, samples, places, members, pairs)
    return Batch._make(
        [
            jax.tree.map(stack, laid),
            jax.tree.map(stack, targets),
            stack(samples),
            np.int32(-(-len(rows) // shape.rows)),
        ]
    )


class Members(NamedTuple):
    """The samples of a row, and the slot that each is computed in; see `distinct`.

    The rejected one of a pair is behind the chosen one.
    """

    samples: Int[np.ndarray, "n"]
    slots: Int[np.ndarray, "n"]


def all_samples(data: TokenizedData) -> tuple[Int[np.ndarray, "1 N"], list[Members], int]:
    """All samples as one row with a slot for each, as `make_targets` takes them."""
    numbers = np.arange(len(data))
    return numbers[None], [Members(numbers, numbers)], max(1, int(data.chosen.sum()))


def make_targets(
    data: TokenizedData,
    samples: Int[np.ndarray, "B S"],
    members: Sequence[Members],
    pairs: int,
) -> Targets:
    """What the scores of slots are compared with, as numpy arrays.

    Args:
      data: the samples.
      samples: the one that each slot of a row holds, -1 for none.
      members: of each row; rows beyond them are empty.
      pairs: there is room for so many in a row.
    """
    labels = np.where(samples[..., None] >= 0, data.labels[samples], np.nan)
    rated = ~np.isnan(labels)
    ratings = Ratings._make(
        [np.where(rated, labels, 0).astype(np.float32), rated.astype(np.float32)]
    )
    return Targets(ratings, _pairs(data, len(samples), members, pairs))


def make_policy_targets(
    data: TokenizedData,
    samples: Int[np.ndarray, "B S"],
    places: Bool[np.ndarray, "B L"],
    members: Sequence[Members],
    pairs: int,
) -> PolicyTargets:
    """What a policy learns from slots, as numpy arrays; see `make_targets`.

    Args:
      data: the samples, with `spoken`.
      samples: the one that each slot of a row holds, -1 for none.
      places: that predict a token of a response; see `predicting`.
      members: of each row; rows beyond them are empty.
      pairs: there is room for so many in a row.
    """
    there = samples >= 0
    lengths, reference, imitated = (np.zeros(samples.shape, np.float32) for _ in range(3))
    lengths[there] = [data.spoken_in(sample).sum() for sample in samples[there]]
    if REFERENCE in data.attributes:
        reference[there] = data.labels[samples[there], data.attributes.index(REFERENCE)]
    # Of a pair the chosen one, and of a tie neither.
    refused = np.concatenate([[False], data.chosen[:-1]]) | (data.chosen & (data.strengths == 0))
    for row, (of_row, slots) in enumerate(members):
        np.add.at(imitated[row], slots, ~refused[of_row])
    responses: Any = (places, lengths, imitated, reference)
    return PolicyTargets(Responses._make(responses), _pairs(data, len(samples), members, pairs))


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


def _pairs(data: TokenizedData, count: int, members: Sequence[Members], most: int) -> Pairs:
    chosen, rejected = (np.zeros((count, most), np.int32) for _ in range(2))
    weights, strengths = (np.zeros((count, most), np.float32) for _ in range(2))
    for row, (samples, slots) in enumerate(members):
        first = np.flatnonzero(data.chosen[samples])
        pairs = slice(len(first))
        chosen[row, pairs], rejected[row, pairs] = slots[first], slots[first + 1]
        weights[row, pairs] = 1
        known = data.strengths[samples[first]]
        strengths[row, pairs] = np.where(np.isnan(known), 1, known)
    found: Any = (chosen, rejected, weights, strengths)
    return Pairs._make(found)


def iterate(batches: Batches, start: int, sharding: Sharding) -> Iterator[Batch]:
    """Batches from step `start` on, made ahead by grain's threads and placed on the mesh."""
    import grain

    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in steps.to_iter_dataset(options):
        yield put(batch, batch_axes(batch), sharding)
