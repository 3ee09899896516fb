"""Who may attend to whom in a row, and what kernels call their result."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

RESULT = "attended"  # the name of attention's result for remat policies


class Layout(NamedTuple):
    """Who may attend to whom in a row.

    Attributes:
      segment_ids: 1 + the token's group, or 0 for padding.
      masked_start: first position in front of the token that belongs to a sample beside its own.
      masked_end: end of these positions; equal to `masked_start` where there is none.
    """

    segment_ids: Int32[Array, "B L"]
    masked_start: Int32[Array, "B L"]
    masked_end: Int32[Array, "B L"]


def sees(
    layout: Layout,
    positions: Int32[Array, "Q"],
    keys: Int32[Array, "B K"],
    key_positions: Int32[Array, "K"],
) -> Bool[Array, "B Q K"]:
    """Which keys each query sees: the meaning of a layout.

    Args:
      layout: of the queries.
      positions: of the queries in their rows.
      keys: segment ids of the keys.
      key_positions: of the keys in their rows.
    """
    causal = key_positions[None, :] <= positions[:, None]
    masked_start, masked_end = layout.masked_start[:, :, None], layout.masked_end[:, :, None]
    seen = (key_positions[None, None] < masked_start) | (key_positions[None, None] >= masked_end)
    queries = layout.segment_ids[:, :, None]
    return causal[None] & (queries == keys[:, None, :]) & (queries > 0) & seen


def allowed(layout: Layout, start: int, end: int) -> Bool[Array, "B Q K"]:
    """The mask of query positions `start` to `end` against key positions 0 to `end`."""
    queries = Layout(*(x[:, start:end] for x in layout))
    return sees(queries, jnp.arange(start, end), layout.segment_ids[:, :end], jnp.arange(end))
