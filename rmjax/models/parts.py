"""Parts of rows: what takes each token by itself is computed only where rows hold tokens.

How many parts do is data and not shape. So one program serves rows that are filled to any degree,
and places behind the last token cost next to nothing. A kernel of attention skips them anyway.

B row, L token
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

SMALLEST_PART = 32  # token positions
_PART = 256  # a smaller one multiplies matrices more slowly; both measured, see docs/benchmarks.md


@functools.partial(jax.tree_util.register_dataclass, data_fields=["count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a micro-batch's rows that hold tokens.

    Attributes:
      count: the smallest parts up to the last token of the row that is filled furthest.
    """

    count: Int32[Array, ""]

    def each(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """What a function of arrays gives, a part at a time, and zeros behind the last part.

        It has no gradient, since how often its loops run is data.

        Args:
          function: from arrays [B, L, ...] to such arrays; it takes each token by itself.
          arrays: what it is called with. Their length is a multiple of the smallest part.
        """
        length = arrays[0].shape[1]

        def loop(size: int, first: Any, end: Any, found: Any) -> Any:
            def step(part: jax.Array, found: Any) -> Any:
                start = part * size
                mine = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in arrays]

                def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                    return jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=1)

                return jax.tree.map(put, found, function(*mine))

            return jax.lax.fori_loop(first, end, step, found)

        found = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arrays)
        )
        done: Any = jnp.int32(0)
        if length >= _PART:
            many = _PART // SMALLEST_PART
            done = self.count // many
            found = loop(_PART, 0, done, found)
            done = done * many
        return loop(SMALLEST_PART, done, self.count, found)


def parts_of(segment_ids: Int32[Array, "B L"]) -> Parts:
    """The parts of rows with these segments."""
    places = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    last = jnp.max(jnp.where(segment_ids > 0, places + 1, 0))
    return Parts((last + SMALLEST_PART - 1) // SMALLEST_PART)


def computed_places(segment_ids: Int[np.ndarray, "B L"], parts: bool) -> int:
    """Token positions computed for rows with these segments: all of them, or in parts."""
    rows, length = segment_ids.shape
    last = int((np.arange(1, length + 1) * (segment_ids > 0)).max()) if parts else length
    return rows * (-(-last // SMALLEST_PART) * SMALLEST_PART if parts else length)
