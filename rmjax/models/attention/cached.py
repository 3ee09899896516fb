"""Attention of one new token a row over what is kept of the tokens before it.

Rows stand in groups. The rows of a group share prompts, whose keys and values are kept once for the
group; behind these every row has its own. Nothing is repeated: neither a prompt for its rows, nor a
key for the queries of its group. The new token's own key and value come from the layer, and are
written into the cache by whoever has it.

G group, R row of a group, K kv_heads, Q queries of a kv head, H head_dim, P place of a prompt's
token, W slot of a row's own token
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from rmjax.models.attention.mask import soft_capped


class Kept(NamedTuple):
    """Keys and values of tokens, of one layer, or of all with an axis in front.

    In keys the place is last: so both products read memory that lies together. The names, shapes
    and shardings of the four stand in the same places.

    Attributes:
      prompt_keys: of the tokens of a group's prompts, [... G K H P].
      prompt_values: likewise, [... G K P H].
      own_keys: of each row's own tokens, [... G K R H W].
      own_values: likewise, [... G K R W H].
    """

    prompt_keys: Any
    prompt_values: Any
    own_keys: Any
    own_values: Any


class Seen(NamedTuple):
    """Which of what is kept each row's new token sees. It always sees itself."""

    prompt: Bool[Array, "G R P"]
    own: Bool[Array, "G R W"]


# The names of each array's axes; of `Kept` those with the layers in front.
KEPT_AXES = Kept(
    ("layers", "row", "kv_heads", "head_dim", "place"),
    ("layers", "row", "kv_heads", "place", "head_dim"),
    ("layers", "row", "kv_heads", "member", "head_dim", "place"),
    ("layers", "row", "kv_heads", "member", "place", "head_dim"),
)


def attend_kept(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    kept: Kept,
    seen: Seen,
    soft_cap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """What `dispatch.attention` gives of the last token of a row that holds all these tokens.

    Args:
      q: queries of the new tokens; the rows of a group follow each other.
      k: their keys.
      v: their values.
      kept: of the tokens before.
      seen: which of these each row sees.
      soft_cap: as of `dispatch.attention`.
    """
    groups, members = seen.prompt.shape[:2]
    kv_heads = k.shape[2]
    q = rearrange(q * q.shape[-1] ** -0.5, "(G R) 1 (K Q) H -> G K R Q H", G=groups, K=kv_heads)
    k, v = (rearrange(x, "(G R) 1 K H -> G K R 1 H", G=groups) for x in (k, v))

    flat = rearrange(q, "G K R Q H -> G K (R Q) H")
    prompt = rearrange(
        _product("gkmh,gkhp->gkmp", flat, kept.prompt_keys),
        "G K (R Q) P -> G K R Q P",
        R=members,
    )
    own = _product("gkrqh,gkrhw->gkrqw", q, kept.own_keys)
    new = (q.astype(jnp.float32) * jnp.broadcast_to(k.astype(jnp.float32), q.shape)).sum(-1)
    prompt, own, new = (soft_capped(x, soft_cap) for x in (prompt, own, new))
    prompt, own = _hide(prompt, seen.prompt), _hide(own, seen.own)

    largest = jnp.maximum(jnp.maximum(_most(prompt), _most(own)), new)[..., None]
    prompt, own, new = (
        jnp.exp(x - jnp.broadcast_to(largest, x.shape)) for x in (prompt, own, new[..., None])
    )
    total = prompt.sum(-1, keepdims=True) + own.sum(-1, keepdims=True) + new
    flat = rearrange(prompt.astype(v.dtype), "G K R Q P -> G K (R Q) P")
    out = rearrange(
        _product("gkmp,gkph->gkmh", flat, kept.prompt_values),
        "G K (R Q) H -> G K R Q H",
        R=members,
    )
    out += _product("gkrqw,gkrwh->gkrqh", own.astype(v.dtype), kept.own_values)
    out += jnp.broadcast_to(new, out.shape) * jnp.broadcast_to(v.astype(jnp.float32), out.shape)
    out = (out / jnp.broadcast_to(total, out.shape)).astype(q.dtype)
    return rearrange(out, "G K R Q H -> (G R) 1 (K Q) H")


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _hide(logits: Float[Array, "G K R Q L"], seen: Bool[Array, "G R L"]) -> jax.Array:
    seen = jnp.broadcast_to(seen[:, None, :, None], logits.shape)
    return jnp.where(seen, logits, -jnp.inf)


def _most(logits: Float[Array, "G K R Q L"]) -> jax.Array:
    return logits.max(-1, initial=-jnp.inf)
