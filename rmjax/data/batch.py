"""Rows and batches: the arrays that data hand to the model.

A row is a fixed number of token places. It holds groups one after the other, each of which is

    [ what its samples begin with, once | rest of sample 1 | rest of sample 2 | ... ]

A token attends to its own group's tokens in front of it, except those of the samples beside its
own: places `masked_start` to `masked_end`. Since a group's beginning is whatever tokens its samples
have in common, every sample gets the numbers it would get alone. Which token belongs where is said
by these arrays alone; nothing is ever inferred from a token's value, so a pad token that equals
eos, or padding on the left, changes nothing.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Float32, Int32

from rmjax.models.inputs import ROWS_AXES, Rows


class Ratings(NamedTuple):
    """What people say of each sample.

    Attributes:
      labels: the ratings, raw; 0 where there is none.
      weights: 1 where a rating is present, else 0.
    """

    labels: Float32[jax.Array, "... S A"]
    weights: Float32[jax.Array, "... S A"]


class Pairs(NamedTuple):
    """Which of two samples in one row people prefer.

    Attributes:
      chosen: slot of the preferred sample; 0 where there is no pair.
      rejected: slot of the other one.
      weights: 1 where there is a pair, else 0.
      strengths: how much better the preferred one is, raw; 0 in a tie, where neither is, or without
        a pair, and 1 where nobody said.
    """

    chosen: Int32[jax.Array, "... P"]
    rejected: Int32[jax.Array, "... P"]
    weights: Float32[jax.Array, "... P"]
    strengths: Float32[jax.Array, "... P"]


class Targets(NamedTuple):
    """What the scores of a row's samples are held against; either may hold nothing."""

    ratings: Ratings
    pairs: Pairs


class Batch(NamedTuple):
    """One optimizer step's data: M micro-batches of B rows with S sample slots.

    Attributes:
      rows: the model's input.
      targets: what the objective holds the scores against.
      samples: the sample's index in its data set, -1 in empty slots.
      microbatches: how many of the M micro-batches hold anything.
    """

    rows: Rows
    targets: Targets
    samples: Int32[jax.Array, "M B S"]
    microbatches: Int32[jax.Array, ""]


TARGETS_AXES = Targets(
    Ratings._make([("row", "sample", "attribute")] * 2), Pairs._make([("row", "sample")] * 4)
)


def _by_microbatch(axes: Any) -> Any:
    return jax.tree.map(
        lambda names: ("microbatch", *names), axes, is_leaf=lambda x: type(x) is tuple
    )


# The names of each array's axes in a step's batch.
BATCH_AXES = Batch._make(
    [_by_microbatch(ROWS_AXES), _by_microbatch(TARGETS_AXES), ("microbatch", "row", "sample"), ()]
)
