"""Attention inside packed rows: one function with one meaning.

A token attends to the tokens of its own sample up to itself. The layout that says so is built once
a row and passed to every layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

_BLOCK = 512  # queries computed at once in rows longer than twice this


class Layout(NamedTuple):
    """Who may attend to whom in a row; fields may be added as rows learn to share prompts."""

    segments: Int32[Array, "B L"]


def allowed(
    layout: Layout, start: jax.Array | int, queries: int, length: int
) -> Bool[Array, "B Q L"]:
    """The mask of `queries` query places from `start` on against all `length` key places."""
    here = jax.lax.dynamic_slice_in_dim(layout.segments, start, queries, axis=1)
    place = start + jnp.arange(queries)
    causal = jnp.arange(length)[None, None, :] <= place[None, :, None]
    return causal & (here[:, :, None] == layout.segments[:, None, :]) & (here[:, :, None] > 0)


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries, logits and softmax in float32.

    Long rows are computed a block of queries at a time and recomputed in the backward pass, so
    that memory grows linearly with the row. Places without a sample get arbitrary finite values.

    Returns:
      The attended values, in the dtype of `q`.
    """
    length, kv_heads = q.shape[1], k.shape[2]
    grouped = rearrange(q, "B L (K G) H -> B L K G H", K=kv_heads) * q.shape[-1] ** -0.5

    def block(start: jax.Array | int, queries: Float[Array, "B Q K G H"]) -> jax.Array:
        logits = jnp.einsum("bqkgh,blkh->bkgql", queries, k, preferred_element_type=jnp.float32)
        mask = allowed(layout, start, queries.shape[1], length)[:, None, None]
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
        return jnp.einsum("bkgql,blkh->bqkgh", weights.astype(v.dtype), v)

    if length <= 2 * _BLOCK or length % _BLOCK:
        out = block(0, grouped)
    else:
        blocks = rearrange(grouped, "B (C Q) K G H -> C B Q K G H", Q=_BLOCK)
        starts = jnp.arange(0, length, _BLOCK)
        out = jax.lax.map(lambda x: jax.checkpoint(block)(*x), (starts, blocks))
        out = rearrange(out, "C B Q K G H -> B (C Q) K G H")
    return rearrange(out, "B L K G H -> B L (K G) H")
