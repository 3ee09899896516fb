"""Attention inside packed rows: one function with one meaning.

A token attends to the tokens of its own sample up to itself. In rows that hold a beginning once
for all samples of a group, these are the group's tokens up to itself without those of other
samples. The layout that says so is built once a row and passed to every layer.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

RESULT = "attended"  # the name of attention's result for remat policies
_BLOCK = 128  # queries computed at once; more in rows so long that there would be too many blocks
_MOST_BLOCKS = 16
_STORED = 2048  # longest row whose attention weights the backward pass finds stored


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


class Plan(Protocol):
    """A layout as a kernel wants it."""

    def attend(
        self, q: Float[Array, "B L N H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]
    ) -> Float[Array, "B L N H"]:
        """What `attention` gives."""
        ...


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


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout | Plan,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries, logits and softmax in float32.

    Places without a sample get arbitrary finite values.

    Args:
      q: queries.
      k: keys.
      v: values.
      layout: as rows have it, or as a kernel wants it; see `kernels.prepare`.

    Returns:
      The attended values, in the dtype of `q`. They have the name `RESULT` for remat policies.
    """
    if isinstance(layout, Layout):
        return checkpoint_name(_in_blocks(q, k, v, layout), RESULT)
    return layout.attend(q, k, v)  # a kernel names what its own backward pass needs


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """Computed a block of queries at a time, each against the keys up to its end only.

    That skips nearly half of the work. In long rows a block is computed again in the backward pass,
    so that memory grows linearly with the row.
    """
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    # Heads in front: then both products are plain batched matrix products.
    q = rearrange(q, "B L (K G) H -> B K G L H", G=groups) * q.shape[-1] ** -0.5
    k, v = rearrange(k, "B L K H -> B K L H"), rearrange(v, "B L K H -> B K L H")

    def block(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        flat = rearrange(queries, "B K G Q H -> B K (G Q) H")
        logits = jnp.einsum("bkqh,bklh->bkql", flat, keys, preferred_element_type=jnp.float32)
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
    return jnp.concatenate(blocks, axis=1)
