"""Attention for CPUs: tiles of queries and keys that stay in a core's cache.

For each tile of queries a loop goes over the tiles of keys between the first and the last that any
of them sees, and keeps a running maximum and sum (online softmax: arXiv 2112.05682, 2205.14135).
The backward pass computes the weights again, so memory is linear in the row. Plain XLA,
differentiated by hand because loops whose bounds are data cannot be otherwise.
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

from rmjax.mask import RESULT, Layout, sees
from rmjax.sharding import Sharding

_TILE = 64  # queries, and keys; from 32 to 128 measured, see docs/performance.md
_UNSEEN = -1e30  # in place of a logit

_ROWS, _LENGTH, _HEADS = ("data", "fsdp"), "context", "tensor"  # as sharding.ACTIVATION_AXES says
_PLACES = P(_ROWS, _LENGTH)
_ACTIVATION = P(_ROWS, _LENGTH, _HEADS)
_TILES = P((*_ROWS, _LENGTH))  # every device has its own


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layout", "first", "end"],
    meta_fields=["sharding"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout with the tiles of keys that each tile of a device's queries needs.

    Attributes:
      layout: of the rows.
      first: the first tile that any query sees, in any row of the device.
      end: one after the last; equal to `first` where there is none.
      sharding: of the rows.
    """

    layout: Layout
    first: Int32[Array, "T"]
    end: Int32[Array, "T"]
    sharding: Sharding

    def attend(
        self, q: Float[Array, "B L N H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]
    ) -> Float[Array, "B L N H"]:
        """What `attention.attention` gives."""
        return jax.shard_map(
            _attend,
            mesh=self.sharding.mesh,
            in_specs=(_ACTIVATION, _ACTIVATION, _ACTIVATION, _PLACES, P(_ROWS), _TILES, _TILES),
            out_specs=_ACTIVATION,
            check_vma=False,
        )(q, k, v, self.layout, self.layout.segments, self.first, self.end)


def make_plan(layout: Layout, sharding: Sharding) -> Plan:
    """Derives from a layout which tiles are needed, each device for its own rows and queries."""

    def local(mine: Layout, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = _start(mine) + jnp.arange(mine.segments.shape[1])
        seen = sees(mine, places, segments, jnp.arange(segments.shape[1]))
        whole = jnp.pad(seen.any(axis=0), [(0, -size % _TILE) for size in seen.shape[1:]])
        tiles = rearrange(whole, "(i a) (j b) -> i j a b", a=_TILE, b=_TILE).any(axis=(2, 3))
        count = tiles.shape[1]
        last = count - 1 - jnp.argmax(tiles[:, ::-1], axis=1)
        first = jnp.argmax(tiles, axis=1)
        return first, jnp.where(tiles.any(axis=1), last + 1, first)

    first, end = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(_PLACES, P(_ROWS)),
        out_specs=(_TILES, _TILES),
        check_vma=False,
    )(layout, layout.segments)
    return Plan(layout, first, end, sharding)


def _start(mine: Layout) -> jax.Array:
    """The place of a device's first query."""
    return jax.lax.axis_index(_LENGTH) * mine.segments.shape[1]


def _attend(q: Any, k: Any, v: Any, mine: Layout, segments: Any, first: Any, end: Any) -> jax.Array:
    if k.shape[1] < segments.shape[1]:
        k, v = (jax.lax.all_gather(x, _LENGTH, axis=1, tiled=True) for x in (k, v))
    length, start = q.shape[1], _start(mine)
    mine, segments = jax.tree.map(_padded, (mine, segments))
    scaled = q * q.shape[-1] ** -0.5
    out = _tiled(
        rearrange(_padded(scaled), "B L (K G) H -> B K G L H", K=k.shape[2]),
        rearrange(_padded(k), "B L K H -> B K L H"),
        rearrange(_padded(v), "B L K H -> B K L H"),
        _Seen(mine, segments, start, first, end),
    )
    return rearrange(out, "B K G L H -> B L (K G) H")[:, :length]


def _padded(x: jax.Array) -> jax.Array:
    """`x` with places of zeros, which are nobody's, up to a whole number of tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _TILE)] + [(0, 0)] * (x.ndim - 2))


# ---- one device ---------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layout", "segments", "start", "first", "end"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a device needs to know who sees whom; places are padded to whole tiles."""

    layout: Layout
    segments: jax.Array
    start: jax.Array
    first: jax.Array
    end: jax.Array

    def mask(self, i: Any, j: Any) -> jax.Array:
        """Of tile `i` of queries against tile `j` of keys, for logits of `_logits`."""
        queries = Layout(*(_take(x, i, 1) for x in self.layout))
        places = jnp.arange(_TILE)
        seen = sees(
            queries,
            self.start + i * _TILE + places,
            _take(self.segments, j, 1),
            j * _TILE + places,
        )
        return seen[:, None, None]


def _take(x: jax.Array, tile: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, tile * _TILE, _TILE, axis)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, _product("bkgqh,bklh->bkgql", q, k), _UNSEEN)


@jax.custom_vjp
def _tiled(
    q: Float[Array, "B K G L H"],
    k: Float[Array, "B K L H"],
    v: Float[Array, "B K L H"],
    seen: _Seen,
) -> Float[Array, "B K G L H"]:
    return _forward(q, k, v, seen)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen
) -> tuple[jax.Array, Float32[Array, "B K G L"]]:
    """The attended values, and the logarithm of each query's sum of exponentials."""

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = _take(q, i, 3)

        def keys(j: jax.Array, carry: Any) -> Any:
            largest, total, out = carry
            logits = _logits(mine, _take(k, j, 2), seen.mask(i, j))
            now = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - now[..., None])
            shrink = jnp.exp(largest - now)
            added = _product("bkgql,bklh->bkgqh", weights.astype(v.dtype), _take(v, j, 2))
            return (
                now,
                total * shrink + weights.sum(-1),
                out * shrink[..., None] + added,
            )

        shape = mine.shape[:-1]
        nothing = (
            jnp.full(shape, _UNSEEN, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(mine.shape, jnp.float32),
        )
        largest, total, out = jax.lax.fori_loop(seen.first[i], seen.end[i], keys, nothing)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # 0 where no tile was needed
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, logsumexp = jax.lax.map(queries, jnp.arange(len(seen.first)))
    out = rearrange(out, "t B K G q H -> B K G (t q) H")
    logsumexp = rearrange(logsumexp, "t B K G q -> B K G (t q)")
    return checkpoint_name(out, RESULT), checkpoint_name(logsumexp, RESULT)


def _forward_and_kept(q: Any, k: Any, v: Any, seen: _Seen) -> tuple[jax.Array, Any]:
    out, logsumexp = _forward(q, k, v, seen)
    return out, (q, k, v, seen, out, logsumexp)


def _backward(kept: Any, by_out: jax.Array) -> tuple[Any, Any, Any, None]:
    q, k, v, seen, out, logsumexp = kept
    mean = (out.astype(jnp.float32) * by_out.astype(jnp.float32)).sum(-1)

    def queries(carry: Any, i: jax.Array) -> Any:
        mine, by_mine, my_sum, my_mean = (_take(x, i, 3) for x in (q, by_out, logsumexp, mean))

        def keys(j: jax.Array, carry: Any) -> Any:
            by_q, by_k, by_v = carry
            k_tile, v_tile = _take(k, j, 2), _take(v, j, 2)
            weights = jnp.exp(_logits(mine, k_tile, seen.mask(i, j)) - my_sum[..., None])
            by_weights = _product("bkgqh,bklh->bkgql", by_mine, v_tile)
            by_logits = (weights * (by_weights - my_mean[..., None])).astype(q.dtype)
            weights = weights.astype(v.dtype)
            return (
                by_q + _product("bkgql,bklh->bkgqh", by_logits, k_tile),
                _add(by_k, j, _product("bkgql,bkgqh->bklh", by_logits, mine)),
                _add(by_v, j, _product("bkgql,bkgqh->bklh", weights, by_mine)),
            )

        nothing = jnp.zeros(mine.shape, jnp.float32)
        by_q, *carry = jax.lax.fori_loop(seen.first[i], seen.end[i], keys, (nothing, *carry))
        return tuple(carry), by_q.astype(q.dtype)

    nothing = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (by_k, by_v), by_q = jax.lax.scan(queries, nothing, jnp.arange(len(seen.first)))
    by_q = rearrange(by_q, "t B K G q H -> B K G (t q) H")
    return by_q, by_k.astype(k.dtype), by_v.astype(v.dtype), None


def _add(x: jax.Array, tile: Any, more: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _take(x, tile, 2) + more, tile * _TILE, 2)


_tiled.defvjp(_forward_and_kept, _backward)
