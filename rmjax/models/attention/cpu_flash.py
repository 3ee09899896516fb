"""Attention for CPUs: tiles of queries and keys that stay in a core's cache.

For each tile of queries a loop goes over the tiles of keys that any of them sees, and keeps a
running maximum and sum (online softmax: arXiv 2112.05682, 2205.14135). The backward pass computes
the weights again, so memory is linear in the row. Plain XLA, differentiated by hand because loops
whose bounds are data cannot be otherwise.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from rmjax.models.attention.mask import RESULT, Keys, Layout, sees, soft_capped
from rmjax.runtime.sharding import Sharding

_TILE = 64  # queries, and keys; from 32 to 128 measured, see docs/benchmarks.md
_UNSEEN = float(jnp.finfo(jnp.float32).min)  # in place of a logit; no logit is less
_NOWHERE = 2**31 - 1  # behind all positions and segments

_ROWS, _LENGTH, _HEADS = ("data", "fsdp"), "context", "tensor"  # as sharding.ACTIVATION_AXES says
_POSITIONS = P(_ROWS, _LENGTH)
_ACTIVATION = P(_ROWS, _LENGTH, _HEADS)
_TILES = P((*_ROWS, _LENGTH))  # every device has its own


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layout", "needed", "count"],
    meta_fields=["sharding"],
)
@dataclasses.dataclass(frozen=True)
class FlashPlan:
    """A layout with the tiles of keys that each tile of a device's queries needs.

    Attributes:
      layout: of the rows.
      needed: for each tile of queries, the tiles of keys that any of them sees, then others.
        Tiles are counted through a device's rows.
      count: how many of these are needed.
      sharding: of the rows.
    """

    layout: Layout
    needed: Int32[Array, "Tq Tk"]
    count: Int32[Array, "Tq"]
    sharding: Sharding

    def attend(
        self,
        q: Float[Array, "B L N H"],
        k: Float[Array, "B L K H"],
        v: Float[Array, "B L K H"],
        soft_cap: float | None = None,
    ) -> Float[Array, "B L N H"]:
        """What `attention.attention` gives."""
        return jax.shard_map(
            functools.partial(_attend, soft_cap),
            mesh=self.sharding.mesh,
            in_specs=(_ACTIVATION, _ACTIVATION, _ACTIVATION, _POSITIONS, P(_ROWS), _TILES, _TILES),
            out_specs=_ACTIVATION,
            check_vma=False,
        )(q, k, v, self.layout, self.layout.keys, self.needed, self.count)


def make_plan(layout: Layout, sharding: Sharding) -> FlashPlan:
    """Derives from a layout which tiles are needed, each device for its own rows and queries.

    A tile is described by the ends of what it holds, so that a long row takes no time for pairs of
    its tokens. So a tile where two segments meet may count tiles as needed that it sees nothing of.
    """

    def local(mine: Layout, keys: Keys) -> tuple[jax.Array, jax.Array]:
        first, last = _extent(mine.segment_ids)
        keys_first, keys_last = _extent(keys.segment_ids)
        ends = _start(mine) + _TILE * jnp.arange(1, first.shape[1] + 1)[None, :, None]
        begins = _TILE * jnp.arange(keys_first.shape[1])[None, None, :]
        there = mine.segment_ids > 0
        from_here = _by_tile(jnp.where(there, mine.masked_start, 0)).max(axis=2)
        to_here = _by_tile(jnp.where(there, mine.masked_end, _NOWHERE)).min(axis=2)
        hidden = (from_here[:, :, None] <= begins) & (to_here[:, :, None] >= begins + _TILE)
        meet = (first[:, :, None] <= keys_last[:, None]) & (keys_first[:, None] <= last[:, :, None])
        tiles = meet & (begins < ends) & ~hidden
        if mine.window_start is not None and keys.sample_positions is not None:
            earliest = _by_tile(jnp.where(there, mine.window_start, _NOWHERE)).min(axis=2)
            latest = jnp.where(keys.segment_ids > 0, keys.sample_positions, -1)
            tiles &= _by_tile(latest).max(axis=2)[:, None] >= earliest[:, :, None]
        needed = (
            jnp.argsort(~tiles, axis=2) + tiles.shape[2] * jnp.arange(len(tiles))[:, None, None]
        )
        return rearrange(needed, "B i j -> (B i) j"), rearrange(tiles.sum(axis=2), "B i -> (B i)")

    needed, count = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(_POSITIONS, P(_ROWS)),
        out_specs=(_TILES, _TILES),
        check_vma=False,
    )(layout, layout.keys)
    return FlashPlan(layout, needed, count, sharding)


def _by_tile(x: jax.Array) -> Int32[Array, "B T q"]:
    """Numbers of a row's positions by tile; the last one is repeated to fill the last tile."""
    whole = jnp.pad(x, [(0, 0), (0, -x.shape[1] % _TILE)], mode="edge")
    return rearrange(whole, "B (t q) -> B t q", q=_TILE)


def _extent(segment_ids: Int32[Array, "B L"]) -> tuple[jax.Array, jax.Array]:
    """The first and the last segment of each tile; none of what is only padding."""
    first = jnp.where(segment_ids > 0, segment_ids, _NOWHERE)
    return _by_tile(first).min(axis=2), _by_tile(segment_ids).max(axis=2)


def _start(mine: Layout) -> jax.Array:
    """The position of a device's first query."""
    return jax.lax.axis_index(_LENGTH) * mine.segment_ids.shape[1]


def _attend(
    soft_cap: float | None,
    q: Any,
    k: Any,
    v: Any,
    mine: Layout,
    keys: Keys,
    needed: Any,
    count: Any,
) -> Any:
    if k.shape[1] < keys.segment_ids.shape[1]:
        k, v = (jax.lax.all_gather(x, _LENGTH, axis=1, tiled=True) for x in (k, v))
    rows, length = mine.segment_ids.shape
    positions = _start(mine) + jnp.arange(length)
    seen = _Seen(
        jax.tree.map(_tiles, mine),
        _tiles(jnp.broadcast_to(positions, (rows, length))),
        jax.tree.map(_tiles, keys),
        _tiles(jnp.broadcast_to(jnp.arange(keys.segment_ids.shape[1]), keys.segment_ids.shape)),
        needed,
        count,
    )
    out: Any = _tiled(
        rearrange(_tiles(q * q.shape[-1] ** -0.5), "t q (K G) H -> t K (G q) H", K=k.shape[2]),
        rearrange(_tiles(k), "t l K H -> t K l H"),
        rearrange(_tiles(v), "t l K H -> t K l H"),
        seen,
        soft_cap,
    )
    return rearrange(out, "(B t) K (G q) H -> B (t q) (K G) H", B=rows, q=_TILE)[:, :length]


def _tiles(x: jax.Array) -> jax.Array:
    """Rows cut into tiles; zeros, which no sample has, make the last one whole."""
    whole = jnp.pad(x, [(0, 0), (0, -x.shape[1] % _TILE)] + [(0, 0)] * (x.ndim - 2))
    return rearrange(whole, "B (t q) ... -> (B t) q ...", q=_TILE)


# ---- one device ---------------------------------------------------------------------------------
# Tiles are the first axis, so that taking one copies memory that lies together, and a group's heads
# with a tile's queries are one axis, so that all is products of matrices.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layout", "positions", "keys", "key_positions", "needed", "count"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a device needs to know who sees whom, by tiles; see `FlashPlan`."""

    layout: Layout
    positions: jax.Array
    keys: Keys
    key_positions: jax.Array
    needed: jax.Array
    count: jax.Array

    def logits(
        self, mine: jax.Array, k: jax.Array, i: Any, j: Any, soft_cap: float | None
    ) -> jax.Array:
        """Of tile `i` of queries against tile `j` of keys."""

        def tiles(of: Any, number: Any) -> Any:
            return jax.tree.map(lambda x: x[number][None], of)

        queries = tiles(self.layout, i)
        seen = sees(queries, self.positions[i], tiles(self.keys, j), self.key_positions[j])
        products = soft_capped(_product("Kqh,Klh->Kql", mine, k[j]), soft_cap)
        shape = (*products.shape[:1], products.shape[1] // _TILE, _TILE, _TILE)
        seen = jnp.broadcast_to(seen[:, None], shape).reshape(products.shape)
        return jnp.where(seen, products, _UNSEEN)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(
    q: Float[Array, "Tq K Q H"],
    k: Float[Array, "Tk K L H"],
    v: Float[Array, "Tk K L H"],
    seen: _Seen,
    soft_cap: float | None,
) -> Float[Array, "Tq K Q H"]:
    return _forward(q, k, v, seen, soft_cap)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen, soft_cap: float | None
) -> tuple[jax.Array, Float32[Array, "Tq K Q"]]:
    """The attended values, and the logarithm of each query's sum of exponentials."""

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = q[i]

        def keys(n: jax.Array, carry: Any) -> Any:
            largest, total, out = carry
            j = seen.needed[i, n]
            logits = seen.logits(mine, k, i, j, soft_cap)
            now = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - now[..., None])
            shrink = jnp.exp(largest - now)
            added = _product("Kql,Klh->Kqh", weights.astype(v.dtype), v[j])
            return now, total * shrink + weights.sum(-1), out * shrink[..., None] + added

        shape = mine.shape[:-1]
        nothing = (
            jnp.full(shape, _UNSEEN, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(mine.shape, jnp.float32),
        )
        largest, total, out = jax.lax.fori_loop(0, seen.count[i], keys, nothing)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # 0 where no tile was needed
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, logsumexp = jax.lax.map(queries, jnp.arange(len(q)))
    return checkpoint_name(out, RESULT), checkpoint_name(logsumexp, RESULT)


def _forward_and_kept(
    q: Any, k: Any, v: Any, seen: _Seen, soft_cap: float | None
) -> tuple[jax.Array, Any]:
    out, logsumexp = _forward(q, k, v, seen, soft_cap)
    return out, (q, k, v, seen, out, logsumexp)


def _backward(soft_cap: float | None, kept: Any, by_out: jax.Array) -> tuple[Any, Any, Any, None]:
    q, k, v, seen, out, logsumexp = kept
    mean = (out.astype(jnp.float32) * by_out.astype(jnp.float32)).sum(-1)

    def queries(carry: Any, i: jax.Array) -> Any:
        mine, by_mine, my_sum, my_mean = q[i], by_out[i], logsumexp[i], mean[i]

        def keys(n: jax.Array, carry: Any) -> Any:
            by_q, by_k, by_v = carry
            j = seen.needed[i, n]
            logits = seen.logits(mine, k, i, j, soft_cap)
            weights = jnp.exp(logits - my_sum[..., None])
            by_weights = _product("Kqh,Klh->Kql", by_mine, v[j])
            by_logits = weights * (by_weights - my_mean[..., None])
            if soft_cap is not None:  # of c tanh(x / c): 1 - tanh(x / c)^2; unseen weigh 0
                by_logits *= 1 - jnp.square(jnp.clip(logits / soft_cap, -1.0, 1.0))
            by_logits = by_logits.astype(q.dtype)
            weights = weights.astype(v.dtype)
            return (
                by_q + _product("Kql,Klh->Kqh", by_logits, k[j]),
                _add(by_k, j, _product("Kql,Kqh->Klh", by_logits, mine)),
                _add(by_v, j, _product("Kql,Kqh->Klh", weights, by_mine)),
            )

        nothing = jnp.zeros(mine.shape, jnp.float32)
        by_q, *carry = jax.lax.fori_loop(0, seen.count[i], keys, (nothing, *carry))
        return tuple(carry), by_q.astype(q.dtype)

    nothing = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (by_k, by_v), by_q = jax.lax.scan(queries, nothing, jnp.arange(len(q)))
    return by_q, by_k.astype(k.dtype), by_v.astype(v.dtype), None


def _add(x: jax.Array, tile: Any, more: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, x[tile] + more, tile, 0)


_tiled.defvjp(_forward_and_kept, _backward)
