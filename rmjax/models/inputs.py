"""The model's input: rows of token positions."""

from typing import NamedTuple

import jax
from jaxtyping import Int32


class Rows(NamedTuple):
    """The model's input; leading axes (`...`) are micro-batches or nothing.

    Attributes:
      tokens: token ids; 0 where `segment_ids` is 0 (the value is never used).
      segment_ids: 1 + the group's number in the row, or 0 for padding.
      positions: position of the token in its own sample, from 0.
      masked_start: first place in front of the token that belongs to a sample beside its own.
      masked_end: end of these places; equal to `masked_start` where there is none.
      last_token_index: of each sample in its row, where its reward is read; 0 in slots without a
        sample.
    """

    tokens: Int32[jax.Array, "... B L"]
    segment_ids: Int32[jax.Array, "... B L"]
    positions: Int32[jax.Array, "... B L"]
    masked_start: Int32[jax.Array, "... B L"]
    masked_end: Int32[jax.Array, "... B L"]
    last_token_index: Int32[jax.Array, "... B S"]


# The names of each array's axes, in the order of the fields.
ROWS_AXES = Rows._make([("row", "length")] * 5 + [("row", "sample")])
