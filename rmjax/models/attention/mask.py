"""Who may attend to whom in a row, and what kernels call their result."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

RESULT = "attended"  # the name of attention's result for remat policies


class Layout(NamedTuple):
    """Who may attend to whom in a row.

    Attributes:
      segments: 1 + the token's group, or 0 for padding.
      hidden_from: first place in front of the token that belongs to a sample beside its own.
      hidden_to: end of these places; equal to `hidden_from` where there is none.
    """

    segments: Int32[Array, "B L"]
    hidden_from: Int32[Array, "B L"]
    hidden_to: Int32[Array, "B L"]


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
      keys: the segments of the keys.
      key_places: of the keys in their rows.
    """
    causal = key_places[None, :] <= places[:, None]
    hidden_from, hidden_to = layout.hidden_from[:, :, None], layout.hidden_to[:, :, None]
    seen = (key_places[None, None] < hidden_from) | (key_places[None, None] >= hidden_to)
    queries = layout.segments[:, :, None]
    return causal[None] & (queries == keys[:, None, :]) & (queries > 0) & seen


def allowed(layout: Layout, start: int, end: int) -> Bool[Array, "B Q K"]:
    """The mask of query places `start` to `end` against key places 0 to `end`."""
    queries = Layout(*(x[:, start:end] for x in layout))
    return sees(queries, jnp.arange(start, end), layout.segments[:, :end], jnp.arange(end))
