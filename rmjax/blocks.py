"""Attention by plain XLA, on any hardware: blocks of queries, each against a window of keys.

A block's window ends with the block and begins with the first group that a query of it belongs to,
rounded up to one of a few static widths, each compiled once. So what lies in other groups is
mostly neither fetched nor computed. The backward pass computes the weights again from the stored
log-sum-exp (arXiv 2205.14135), so that memory is linear in the row's length.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from rmjax.mask import RESULT, Layout, sees

_BLOCK = 128  # queries computed at once
_MASKED = float(jnp.finfo(jnp.float32).min)


def widths(length: int, size: int) -> list[int]:
    """The widths of windows: 1, 2, 3, 4, 6, 8, 12, 16 ... blocks, and the whole row."""
    blocks = [1, *(n for power in range(1, 32) for n in (2**power, 3 * 2 ** (power - 1)))]
    return [*(n * size for n in blocks if n * size < length), length]


def first_needed(layout: Layout, size: int) -> Int32[Array, "L/size"]:
    """For each block of queries the first place that one of them may see, in any row."""
    segments = layout.segments
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    group = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    needed = jnp.where(segments > 0, group, jnp.broadcast_to(places, group.shape))
    return rearrange(needed, "B (n s) -> n (B s)", s=size).min(axis=1)


def in_blocks(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout,
) -> Float[Array, "B L N H"]:
    """What `attention.attention` gives."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    size = min(_BLOCK, length)
    short = -length % size  # places of padding, so that all blocks are whole

    def whole(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) if short else x

    layout = Layout(*map(whole, layout))
    q = rearrange(whole(q), "B L (K G) H -> B K G L H", G=groups) * q.shape[-1] ** -0.5
    k, v = (rearrange(whole(x), "B L K H -> B K L H") for x in (k, v))
    out: jax.Array = _attend(size, q, k, v, layout, first_needed(layout, size))  # pyright: ignore
    return rearrange(out, "B K G L H -> B L (K G) H")[:, :length]


def _each_block(
    size: int, length: int, first: jax.Array, carry: Any, block: Callable[[Any, Any, int, Any], Any]
) -> Any:
    """Calls `block(start, window_start, width, carry)` for each block of queries, one by one."""
    sizes = widths(length, size)

    def step(number: jax.Array, carry: Any) -> Any:
        start = number * size
        branches = [
            functools.partial(
                lambda width, carry: block(
                    start, jnp.maximum(start + size - width, 0), width, carry
                ),
                width,
            )
            for width in sizes
        ]
        needed = start + size - first[number]
        return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), needed), branches, carry)

    return jax.lax.fori_loop(0, length // size, step, carry)


def _take(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)


def _logits(
    q: jax.Array, k: jax.Array, layout: Layout, start: Any, window: Any
) -> Float[Array, "B K G Q W"]:
    """Logits of a block of queries against a window of keys, masked."""
    size, width = q.shape[3], k.shape[2]
    queries = Layout(*(_take(x, start, size, 1) for x in layout))
    keys = _take(layout.segments, window, width, 1)
    mask = sees(queries, start + jnp.arange(size), keys, window + jnp.arange(width))
    flat = rearrange(q, "B K G Q H -> B K (G Q) H")
    logits = jnp.einsum("bkqh,bklh->bkql", flat, k, preferred_element_type=jnp.float32)
    logits = rearrange(logits, "B K (G Q) W -> B K G Q W", Q=size)
    return jnp.where(mask[:, None, None], logits, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    size: int, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, first: jax.Array
) -> jax.Array:
    return _forward(size, q, k, v, layout, first)[0]


def _forward(
    size: int, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, first: jax.Array
) -> tuple[jax.Array, Any]:
    def block(start: Any, window: Any, width: int, carry: Any) -> Any:
        out, total = carry
        part, values = _take(q, start, size, 3), _take(v, window, width, 2)
        logits = _logits(part, _take(k, window, width, 2), layout, start, window)
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        sums = weights.sum(axis=-1, keepdims=True)
        flat = rearrange(weights.astype(v.dtype), "B K G Q W -> B K (G Q) W")
        found = jnp.einsum("bkql,bklh->bkqh", flat, values, preferred_element_type=jnp.float32)
        found = rearrange(found, "B K (G Q) H -> B K G Q H", Q=size) / sums
        total = _put(total, (largest + jnp.log(sums))[..., 0], start, 3)
        return _put(out, found.astype(out.dtype), start, 3), total

    empty = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32)
    out, total = _each_block(size, q.shape[3], first, empty, block)
    out, total = checkpoint_name(out, RESULT), checkpoint_name(total, RESULT)
    return out, (q, k, v, layout, first, out, total)


def _backward(size: int, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, layout, first, out, total = kept
    # What every logit's gradient is lowered by: the mean of its weights' gradients.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def block(start: Any, window: Any, width: int, carry: Any) -> Any:
        dq, dk, dv = carry
        part, keys = _take(q, start, size, 3), _take(k, window, width, 2)
        values, d_part = _take(v, window, width, 2), _take(d_out, start, size, 3)
        logits = _logits(part, keys, layout, start, window)
        weights = jnp.exp(logits - _take(total, start, size, 3)[..., None])
        d_flat = rearrange(d_part, "B K G Q H -> B K (G Q) H")
        d_weights = jnp.einsum(
            "bkqh,bklh->bkql", d_flat, values, preferred_element_type=jnp.float32
        )
        d_weights = rearrange(d_weights, "B K (G Q) W -> B K G Q W", Q=size)
        d_logits = weights * (d_weights - _take(mean, start, size, 3)[..., None])
        flat, d_logits = (
            rearrange(x.astype(q.dtype), "B K G Q W -> B K (G Q) W") for x in (weights, d_logits)
        )
        found = jnp.einsum("bkql,bklh->bkqh", d_logits, keys)
        dq = _put(dq, rearrange(found, "B K (G Q) H -> B K G Q H", Q=size), start, 3)
        queries = rearrange(part, "B K G Q H -> B K (G Q) H")
        dk = _add(dk, jnp.einsum("bkql,bkqh->bklh", d_logits, queries), window)
        dv = _add(dv, jnp.einsum("bkql,bkqh->bklh", flat, d_flat), window)
        return dq, dk, dv

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    dq, dk, dv = _each_block(size, q.shape[3], first, (jnp.zeros_like(q), *zeros), block)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _add(total: jax.Array, part: jax.Array, window: Any) -> jax.Array:
    there = _take(total, window, part.shape[2], 2)
    return _put(total, there + part.astype(total.dtype), window, 2)


_attend.defvjp(_forward, _backward)
