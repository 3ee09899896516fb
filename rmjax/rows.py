"""Rows and batches: the arrays that data hand to the model.

A row is a fixed number of token places holding several samples one after the other. Which token
belongs to which sample is said by `segments` alone; nothing is ever inferred from a token's value,
so a pad token that equals eos, or padding on the left, changes nothing.
"""

from typing import NamedTuple

import jax
from jaxtyping import Float32, Int32


class Rows(NamedTuple):
    """The model's input; leading axes (`...`) are micro-batches or nothing.

    Attributes:
      tokens: token ids; 0 where `segments` is 0 (the value is never used).
      segments: 1 + the sample's slot in the row, or 0 for padding.
      positions: position of the token in its own sample, from 0.
      ends: place in the row of each sample's last token, where its reward is read; 0 in slots
        without a sample.
    """

    tokens: Int32[jax.Array, "... B L"]
    segments: Int32[jax.Array, "... B L"]
    positions: Int32[jax.Array, "... B L"]
    ends: Int32[jax.Array, "... B S"]


# The names of each array's axes, in the order of the fields.
ROWS_AXES = Rows._make([("row", "length")] * 3 + [("row", "sample")])


class Batch(NamedTuple):
    """One optimizer step's data: M micro-batches of B rows with S sample slots.

    Attributes:
      rows: the model's input.
      labels: the ratings, raw; 0 where there is none.
      weights: 1 where a rating is present, else 0.
      samples: the sample's index in its data set, -1 in empty slots.
      microbatches: how many of the M micro-batches hold anything.
    """

    rows: Rows
    labels: Float32[jax.Array, "M B S A"]
    weights: Float32[jax.Array, "M B S A"]
    samples: Int32[jax.Array, "M B S"]
    microbatches: Int32[jax.Array, ""]


_PER_SAMPLE = ("microbatch", "row", "sample", "attribute")
BATCH_AXES = Batch._make(
    [
        Rows._make(("microbatch", *axes) for axes in ROWS_AXES),
        _PER_SAMPLE,
        _PER_SAMPLE,
        _PER_SAMPLE[:3],
        (),
    ]
)
