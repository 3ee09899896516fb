"""What the kernel for TPUs asks of a query and a key: who sees whom, in one number a query.

The kernel carries 32 bits for each query and knows a key's position. So a query's number holds its
position, the interval that is hidden from it and, with windows, whether there is one; `mask.sees`
is what they mean.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from rmjax.models.attention.mask import Layout

_BITS = 32


def alignment(row_length: int, windowed: bool = False) -> int:
    """The positions a multiple of which `masked_start` and `masked_end` must be in rows so long.

    A power of two, such that a position and two multiples fit together in 32 bits; and with windows
    whether there is one.
    """
    position = (row_length - 1).bit_length()
    return 2 ** max(0, -(-(3 * position + windowed - _BITS) // 2))


def _fields(length: int, windowed: bool) -> tuple[int, int, int]:
    """Where in a number begin: whether there is a window, a position, and the upper bound."""
    shift = _shift(length, windowed)
    places = (length - 1).bit_length()
    bound = places - shift
    return 2 * bound + places, 2 * bound, bound


def _shift(length: int, windowed: bool) -> int:
    return alignment(length, windowed).bit_length() - 1


def query_numbers(
    layout: Layout, positions: Int32[Array, "Q"], length: int, windowed: bool = False
) -> Int32[Array, "R Q"]:
    """A query's position in its row and the bounds of what is hidden from it, in one number.

    With windows also whether one hides anything from it.
    """
    window, position, bound = _fields(length, windowed)
    shift = _shift(length, windowed)
    start, end = layout.masked_start >> shift, layout.masked_end >> shift
    number = (positions[None, :] << position) | (end << bound) | start
    if not windowed or layout.window_start is None:
        return number
    return number | ((layout.window_start > 0).astype(jnp.int32) << window)


@functools.lru_cache
def mask_function(
    length: int, rows: int, window: int | None = None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What the kernel asks of a query's number and a key's position; one object for each argument.

    What depends on the query alone, or on the key alone, the compiler does once for many pairs.
    """
    windowed = window is not None
    flag, position, bound = _fields(length, windowed)
    largest, shift = 2**bound - 1, _shift(length, windowed)

    def sees(number: jax.Array, key: jax.Array) -> jax.Array:
        if rows > 1:
            key = jax.lax.rem(key, length)
        unit = key >> shift
        start, end = number & largest, (number >> bound) & largest
        query = jax.lax.shift_right_logical(number, position)
        if window is None:
            return (key <= query) & ((unit < start) | (unit >= end))
        has_window = jax.lax.shift_right_logical(number, flag) > 0
        query &= 2 ** (flag - position) - 1
        # What stands in the row between a shared prefix and the rest of a sample does not count.
        between = jnp.where(unit < end, (end - start) << shift, 0)
        near = (key + between > query - window) | ~has_window
        return (key <= query) & ((unit < start) | (unit >= end)) & near

    return sees


def says_windows(layout: Layout, window: int) -> Bool[Array, ""]:
    """Whether `mask_function` finds the windows of a layout.

    Either a window begins with the token's sample, or `window` tokens back; and a token's position
    in its sample is the distance from its segment's first place, less what is hidden in between.
    """
    if layout.sample_positions is None or layout.window_start is None:
        return jnp.asarray(True)
    positions = layout.sample_positions
    whole = (layout.window_start == 0) | (layout.window_start == positions - (window - 1))
    length = layout.segment_ids.shape[1]
    places = jnp.arange(length)[None]
    before = jnp.pad(jax.lax.cummax(layout.segment_ids, axis=1), ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(layout.segment_ids > before, places, 0), axis=1)
    distance = places - first - (layout.masked_end - layout.masked_start)
    return jnp.all((layout.segment_ids == 0) | (whole & (distance == positions)))
