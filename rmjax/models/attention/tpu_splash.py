"""The attention kernel for TPUs: JAX's splash attention, told what rows hide.

The kernel takes a function of a query's number and a key's position that says whether the query
may see the key (`splash_mask.py`), and for every block of queries the blocks of keys to visit. Both
come from the layout, on the device, once for all layers. Blocks in which nothing is seen are
neither fetched nor computed.

The rows of a device are laid end to end, so that one call of the kernel does all of them. Over the
mesh, rows and heads are divided; where `context` divides a row, each device has the queries of its
part and gathers the keys.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from rmjax.models.attention.mask import RESULT, Keys, Layout, sees
from rmjax.models.attention.splash_mask import (
    alignment,
    mask_function,
    query_numbers,
    says_windows,
)
from rmjax.runtime.sharding import Sharding

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
        SplashAttentionKernel,
    )

SMALLEST_BLOCK = 128  # the lanes of a tile
_BLOCKS = (512, 256, SMALLEST_BLOCK)  # queries and keys of a block
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # two of them still have a difference
_MOST_PARTS = 8  # of the gradients by queries

_ROWS, _LENGTH, _HEADS = ("data", "fsdp"), "context", "tensor"  # as sharding.ACTIVATION_AXES says
_POSITIONS = P((*_ROWS, _LENGTH))  # an axis on which the positions of all rows follow each other
_ARRAYS = ("steps", "keys_next", "queries_next", "numbers", "queries", "keys", "one")
_SPECS = (_POSITIONS, _POSITIONS, P(_LENGTH, _ROWS), _POSITIONS, _POSITIONS, P(_ROWS), _POSITIONS)
_STATIC = ("sharding", "length", "block", "window", "interpret")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True)
class SplashPlan:
    """What the kernel needs of a layout. Every device has its part; the whole has no meaning.

    On a device there are R rows of L positions, of which it has the queries of Q = L / context, in
    blocks of b. Blocks of rows laid end to end are counted through.

    Attributes:
      steps: whether a block of queries sees anything in a block of keys of its row.
      keys_next: for each of these, in the order of queries and then keys, the block of keys that is
        needed then or next.
      queries_next: the block of queries that is needed then or next, in the order of keys and then
        queries.
      numbers: of the queries, see `splash_mask.query_numbers`.
      queries: what the queries have in common with the keys they may see: 1 + the group, counted
        through all rows; 0 for padding.
      keys: the same for the keys; -1 for padding, which nobody sees.
      one: 1, or NaN where the layout is not aligned as `alignment` says, or a window cannot be
        said by `window`: a wrong result is not given silently.
      sharding: of the rows.
      length: positions of a row.
      block: queries and keys of a block.
      window: tokens that a query sees whose number says that it has a window; None if none has.
      interpret: whether the kernel is interpreted, as tests do on CPUs.
    """

    steps: Bool[Array, "R*Q/b L/b"]
    keys_next: Int[Array, "R*Q/b L/b"]
    queries_next: Int[Array, "Q/b R*L/b"]
    numbers: Int32[Array, "R*Q"]
    queries: Int32[Array, "R*Q"]
    keys: Int32[Array, "R*L"]
    one: Float32[Array, "1"]
    sharding: Sharding
    length: int
    block: int
    window: int | None
    interpret: bool

    def attend(
        self,
        q: Float[Array, "B L N H"],
        k: Float[Array, "B L K H"],
        v: Float[Array, "B L K H"],
        soft_cap: float | None = None,
    ) -> Float[Array, "B L N H"]:
        """What `attention.attention` gives, by the kernel."""
        specs: Any = dataclasses.replace(self, **dict(zip(_ARRAYS, _SPECS)))
        activation = P(_ROWS, _LENGTH, _HEADS)
        return jax.shard_map(
            functools.partial(_attend, soft_cap),
            mesh=self.sharding.mesh,
            in_specs=(activation, activation, activation, specs),
            out_specs=activation,
            check_vma=False,
        )(q, k, v, self)


def unsupported(row_length: int, head_dim: int, sharding: Sharding, windowed: bool = False) -> str:
    """Why the kernel cannot be had for such rows; empty if it can."""
    context = sharding.mesh.shape["context"]
    if row_length % (context * SMALLEST_BLOCK):
        parts = f" on each of {context} devices (mesh axis context)" if context > 1 else ""
        return f"a row of {row_length} positions is not a multiple of {SMALLEST_BLOCK}{parts}"
    unit = alignment(row_length, windowed)
    if row_length % unit:
        return f"a row of {row_length} positions is not a multiple of {unit}"
    if head_dim % 8:
        return f"head_dim = {head_dim} is not a multiple of 8"
    return ""


def make_plan(
    layout: Layout,
    sharding: Sharding,
    *,
    block: int | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> SplashPlan:
    """Derives from a layout what the kernel needs, each device for its own rows and queries.

    Args:
      layout: of rows whose length `unsupported` does not refuse.
      sharding: the mesh and how rows lie on it.
      block: queries and keys of a block; the largest that divides if not given.
      window: tokens that a query sees at most where the layout has a `window_start` beyond 0.
      interpret: whether to interpret the kernel.
    """
    length = layout.segment_ids.shape[1]
    part = length // sharding.mesh.shape["context"]
    block = block or next(size for size in _BLOCKS if part % size == 0)

    local = functools.partial(_local_plan, part=part, block=block, window=window)
    arrays = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=P(_ROWS), out_specs=_SPECS, check_vma=False
    )(layout)
    return SplashPlan(
        *arrays,
        sharding=sharding,
        length=length,
        block=block,
        window=window,
        interpret=interpret,
    )


def _local_plan(
    layout: Layout, *, part: int, block: int, window: int | None
) -> tuple[jax.Array, ...]:
    """The arrays of a plan on one device, in the order of `_ARRAYS`."""
    rows, length = layout.segment_ids.shape
    start = jax.lax.axis_index(_LENGTH) * part
    mine: Any = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, part, axis=1), layout)
    positions = start + jnp.arange(part)
    steps = _steps(mine, positions, layout.keys, block)
    row = jnp.arange(rows)[:, None] * (length + 1)
    bounds = jnp.stack([mine.masked_start, mine.masked_end])
    hides = (mine.masked_start < mine.masked_end)[None]
    aligned = jnp.all(~hides | (bounds % alignment(length, window is not None) == 0))
    if window is not None:
        aligned &= says_windows(layout, window)
    return (
        rearrange(steps, "R q k -> (R q) k"),
        _keys_next(steps),
        _queries_next(steps),
        query_numbers(mine, positions, length, window is not None).ravel(),
        jnp.where(mine.segment_ids > 0, mine.segment_ids + row, 0).ravel(),
        jnp.where(layout.segment_ids > 0, layout.segment_ids + row, -1).ravel(),
        jnp.where(aligned, 1.0, jnp.nan)[None],
    )


def _attend(
    soft_cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, plan: SplashPlan
) -> jax.Array:
    # Here and below, since only TPUs need Pallas, which takes long to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    rows = q.shape[0]
    if plan.sharding.mesh.shape[_LENGTH] > 1:
        k, v = (jax.lax.all_gather(x, _LENGTH, axis=1, tiled=True) for x in (k, v))
    q = q * (plan.one * q.shape[-1] ** -0.5).astype(q.dtype)[:, None, None, None]
    q, k, v = (rearrange(x, "R L N H -> N (R L) H") for x in (q, k, v))
    out: Any = _kernel(plan, rows, soft_cap)(q, k, v, SegmentIds(plan.queries, plan.keys))
    return rearrange(out, "N (R L) H -> R L N H", R=rows)


def _kernel(plan: SplashPlan, rows: int, soft_cap: float | None) -> "SplashAttentionKernel":
    """JAX's kernel with our mask information in place of what it derives from a static mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    steps = plan.steps.astype(jnp.int8)
    numbers: Any = plan.numbers  # which the library's types take for a numpy array
    forward = MaskInfo(plan.keys_next[None], None, steps[None], None, numbers)
    by_keys = rearrange(steps, "(R q) k -> q (R k)", R=rows)
    backward = MaskInfo(plan.queries_next[None], None, by_keys[None], None, numbers)
    size = plan.block
    # One kernel for all gradients does less, but writes those by queries once for each block of
    # keys, to be added; and it knows only queries of one row.
    fused = rows == 1 and plan.length // size <= _MOST_PARTS
    by_queries = None if fused else size
    return splash_attention_kernel.SplashAttentionKernel(
        forward,
        None if fused else forward,
        backward,
        block_sizes=BlockSizes(
            *[size] * 6,
            block_q_dq=by_queries,
            block_kv_dq=by_queries,
            use_fused_bwd_kernel=fused,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=_MASKED,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESULT,
        mask_function=mask_function(plan.length, rows, plan.window),
        interpret=plan.interpret,
    )


def _steps(
    mine: Layout, positions: Int32[Array, "Q"], keys: Keys, block: int
) -> Bool[Array, "R Q/b L/b"]:
    """Whether any query of a block sees any key of a block.

    A query of padding sees nothing, and the kernel gives it the mean of what it visits. So that it
    visits something, the keys at the same positions as a block of queries always count as seen.
    """
    length = keys.segment_ids.shape[1]
    seen = sees(mine, positions, keys, jnp.arange(length))
    steps = rearrange(seen, "R (q a) (k b) -> R q k a b", a=block, b=block).any(axis=(-1, -2))
    same = positions[::block, None] // block == jnp.arange(length // block)[None]
    return steps | same[None]


def _keys_next(steps: Bool[Array, "R q k"]) -> Int[Array, "R*q k"]:
    """The block of keys of each step that is taken; of others, that of the next one taken."""
    rows, _, blocks = steps.shape
    row = jnp.arange(rows)[:, None, None] * blocks
    block = jnp.broadcast_to(row + jnp.arange(blocks)[None, None], steps.shape)
    found = _next(steps.ravel(), block.ravel()).reshape(-1, blocks)
    return found.astype(_smallest(rows * blocks))


def _queries_next(steps: Bool[Array, "R q k"]) -> Int[Array, "q R*k"]:
    """The block of queries of each step that is taken; of others, that of the next one taken.

    The kernel goes through the queries of a block of keys once for each head, so after the last
    comes the first.
    """
    rows, blocks, _ = steps.shape
    row = jnp.arange(rows)[:, None, None] * blocks
    block = jnp.broadcast_to(row + jnp.arange(blocks)[None, :, None], steps.shape)
    by_keys, number = (rearrange(x, "R q k -> (R k) q") for x in (steps, block))
    return jax.vmap(_next)(by_keys, number).T.astype(_smallest(rows * blocks))


def _next(taken: Bool[Array, "S"], value: Int32[Array, "S"]) -> Int32[Array, "S"]:
    """`value` at the first position from here on that is taken, going round; itself if none is."""
    count = taken.shape[0]
    position = jnp.arange(count)
    ahead = jax.lax.cummin(jnp.where(taken, position, count), reverse=True)
    ahead = jnp.where(ahead < count, ahead, ahead[0])
    return value[jnp.where(ahead < count, ahead, position)]


def _smallest(values: int) -> jnp.dtype:
    """The smallest integer the kernel takes for so many values: scalar memory is scarce."""
    return jnp.dtype(jnp.int8 if values <= 128 else jnp.int16 if values <= 2**15 else jnp.int32)
