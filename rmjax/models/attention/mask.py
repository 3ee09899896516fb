"""Who may attend to whom in a row, and what kernels call their result."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

RESULT = "attended"  # the name of attention's result for remat policies


class Keys(NamedTuple):
    """What of keys says who sees them; the names are those of `Layout`."""

    segment_ids: Int32[Array, "B K"]
    sample_positions: Int32[Array, "B K"] | None


class Layout(NamedTuple):
    """Who may attend to whom in a row.

    Attributes:
      segment_ids: 1 + the token's group, or 0 for padding.
      masked_start: first position in front of the token that belongs to a sample beside its own.
      masked_end: end of these positions; equal to `masked_start` where there is none.
      sample_positions: of each token in its own sample; None if no token's sight ends before its
        sample's beginning, as with `window_start`.
      window_start: the first of these positions that the token sees.
    """

    segment_ids: Int32[Array, "B L"]
    masked_start: Int32[Array, "B L"]
    masked_end: Int32[Array, "B L"]
    sample_positions: Int32[Array, "B L"] | None = None
    window_start: Int32[Array, "B L"] | None = None

    @property
    def keys(self) -> Keys:
        """Of the same tokens, what says who sees them."""
        return Keys(self.segment_ids, self.sample_positions)

    def windowed(self, sample_positions: Int32[Array, "B L"], window: int | None) -> "Layout":
        """The same, each token seeing but `window` tokens of its sample, itself and those before.

        Positions are those in the sample: what stands between a shared prefix and the rest of a
        sample in the row does not count. Without a window there are the same arrays.
        """
        first = sample_positions * 0 if window is None else sample_positions - (window - 1)
        return self._replace(sample_positions=sample_positions, window_start=jnp.maximum(first, 0))


def sees(
    layout: Layout,
    positions: Int32[Array, "Q"],
    keys: Keys,
    key_positions: Int32[Array, "K"],
) -> Bool[Array, "B Q K"]:
    """Which keys each query sees: the meaning of a layout.

    Args:
      layout: of the queries.
      positions: of the queries in their rows.
      keys: what of the keys says who sees them.
      key_positions: of the keys in their rows.
    """
    causal = key_positions[None, :] <= positions[:, None]
    masked_start, masked_end = layout.masked_start[:, :, None], layout.masked_end[:, :, None]
    seen = (key_positions[None, None] < masked_start) | (key_positions[None, None] >= masked_end)
    queries = layout.segment_ids[:, :, None]
    seen = causal[None] & (queries == keys.segment_ids[:, None, :]) & (queries > 0) & seen
    if layout.window_start is None or keys.sample_positions is None:
        return seen
    return seen & (keys.sample_positions[:, None, :] >= layout.window_start[:, :, None])


def allowed(layout: Layout, start: int, end: int) -> Bool[Array, "B Q K"]:
    """The mask of query positions `start` to `end` against key positions 0 to `end`."""
    queries: Any = jax.tree.map(lambda x: x[:, start:end], layout)
    keys: Any = jax.tree.map(lambda x: x[:, :end], layout.keys)
    return sees(queries, jnp.arange(start, end), keys, jnp.arange(end))


def soft_capped(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """c tanh(x / c) of logits x, between -c and c; the logits themselves where there is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
