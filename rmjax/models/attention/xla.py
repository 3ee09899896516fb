"""Attention by plain XLA, on any hardware: the fallback of kernels, and their reference.

Blocks of queries, each against the keys up to its end only, which skips nearly half of the work.
Differentiated by JAX.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rmjax.models.attention.mask import RESULT, Layout, allowed, soft_capped

_BLOCK = 128  # queries computed at once; more in rows so long that there would be too many blocks
_MOST_BLOCKS = 16
_STORED = 2048  # longest row whose attention weights the backward pass finds stored


def in_blocks(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout,
    soft_cap: float | None = None,
) -> Float[Array, "B L N H"]:
    """What `attention.attention` gives.

    In long rows a block is computed again in the backward pass, so that memory is linear in the
    row.
    """
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    # Heads in front: then both products are plain batched matrix products.
    q = rearrange(q, "B L (K G) H -> B K G L H", G=groups) * q.shape[-1] ** -0.5
    k, v = rearrange(k, "B L K H -> B K L H"), rearrange(v, "B L K H -> B K L H")

    def block(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        flat = rearrange(queries, "B K G Q H -> B K (G Q) H")
        logits = jnp.einsum("bkqh,bklh->bkql", flat, keys, preferred_element_type=jnp.float32)
        logits = soft_capped(logits, soft_cap)
        logits = rearrange(logits, "B K (G Q) L -> B K G Q L", G=groups)
        weights = jax.nn.softmax(
            jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min), axis=-1
        )
        weights = rearrange(weights.astype(values.dtype), "B K G Q L -> B K (G Q) L")
        out = jnp.einsum("bkql,bklh->bkqh", weights, values)
        return rearrange(out, "B K (G Q) H -> B Q (K G) H", G=groups)

    if length > _STORED:
        block = jax.checkpoint(block)
    size = max(_BLOCK, -(-length // (_MOST_BLOCKS * _BLOCK)) * _BLOCK)
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = allowed(layout, start, end)
        blocks.append(block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], mask))
    return checkpoint_name(jnp.concatenate(blocks, axis=1), RESULT)
