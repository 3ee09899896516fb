"""Who may attend to whom in a row, and what kernels call their result."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

RESULT = "attended"  # the name of attention's result for remat policies


class Layout(NamedTuple):
    """Who may attend to whom in a row.

    Attributes:
      segment_ids: 1 + the token's group, or 0 for padding.
      masked_start: first place in front of the token that belongs to a sample beside its own.
      masked_end: end of these places; equal to `masked_start` where there is none.
    """

    segment_ids: Int32[Array, "B L"]
    masked_start: Int32[Array, "B L"]
    masked_end: Int32[Array, "B L"]


def sees(
    layout: Layout,
    places: Int32[Array, "Q"],
    keys: Int32[Array, "B K"],
    key_places: Int32[Array, "K"],
) -> Bool[Array, "B Q K"]:
    """Which keys each query sees: the meaning of a layout.

    Args:
      layout: of the queries.
      places: of the queries in their rows.
      keys: the segment_ids of the keys.
      key_places: of the keys in their rows.
    """
    causal = key_places[None, :] <= places[:, None]
    masked_start, masked_end = layout.masked_start[:, :, None], layout.masked_end[:, :, None]
    seen = (key_places[None, None] < masked_start) | (key_places[None, None] >= masked_end)
    queries = layout.segment_ids[:, :, None]
    return causal[None] & (queries == keys[:, None, :]) & (queries > 0) & seen


def allowed(layout: Layout, start: int, end: int) -> Bool[Array, "B Q K"]:
    """The mask of query places `start` to `end` against key places 0 to `end`."""
    queries = Layout(*(x[:, start:end] for x in layout))
    return sees(queries, jnp.arange(start, end), layout.segment_ids[:, :end], jnp.arange(end))
