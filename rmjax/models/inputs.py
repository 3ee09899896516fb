"""The model's input: rows of token positions."""

from typing import NamedTuple

import jax
from jaxtyping import Int32


class Rows(NamedTuple):
    """The model's input: rows into which samples are packed.

    A row is a fixed number of token positions. It holds segments one after the other, each of which
    is a prefix that its samples share and then the rest of each sample, a branch:

        [ shared prefix | rest of sample 1 | rest of sample 2 | ... ]

    A token attends to the tokens of its own segment in front of it, except those of the branches
    before its own, which are the positions `masked_start` to `masked_end`. So every sample gets the
    numbers that it would get alone. These arrays alone say which token belongs where. Nothing is
    inferred from a token's value, so a pad token that equals EOS, or padding on the left, changes
    nothing. Leading axes (`...`) are micro-batches or nothing.

    Attributes:
      tokens: token ids; 0 where `segment_ids` is 0 (the value is never used).
      segment_ids: 1 + the segment's number in the row, or 0 for padding.
      positions: position of the token in its own sample, from 0.
      masked_start: first position in front of the token that belongs to another branch.
      masked_end: end of these positions; equal to `masked_start` where there is none.
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
