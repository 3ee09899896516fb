"""Kernels of attention against each other on one GPU, in packed rows whose prompts are shared.

    python benchmarks/gpu_kernels.py

Every kernel computes the same rows, forward and then forward with backward, in bfloat16; what it
gives is compared with `xla` in float32. Lengths are of HelpSteer2's mean, and of long pairs. A
kernel that is not there, or refuses, has a row that says why, and the others go on. Without a GPU
the same is done on tiny rows, with XLA's operations in place of kernels: that proves the program,
not the kernels.

- `xla`, `cudnn`: as rmjax has them. cuDNN has a mask of all pairs, and skips what causality hides.
- `tokamax`: Pallas kernels that get each query's first key beside the mask, and skip what is before
  it: other groups, but not the responses between a response and its prompt.
- `cudnn, two calls`: responses to their prompts, and every part to itself, each a call for
  stretches of a row, merged by their log-sum-exp. Nothing hidden is computed. cuDNN's gradients of
  both calls are taken at the merged log-sum-exp, which is what makes them right; JAX has neither
  that nor the stretches in its public functions.

JAX's own Pallas kernels are left out: they know segments and causality, or no mask at all.
"""

import argparse
import functools
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.models.attention import dispatch, gpu_cudnn
from rmjax.models.attention.mask import Layout, sees
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

ON_GPU = jax.default_backend() == "gpu"
TOLERANCE = 0.01  # of the norm; see tests/models/attention/test_gpu_cudnn.py
OURS = ("xla", "cudnn")  # a wrong result of these is a failure; of others it is a finding


class Case(NamedTuple):
    """Rows to compute: heads, kv heads, head_dim, rows, length; mean prompt, response; how many."""

    name: str
    heads: tuple[int, int, int]
    rows: int
    length: int
    prompt: int
    response: int
    responses: int


CASES = (
    Case("8B, HelpSteer2", (32, 8, 128), 4, 4096, 180, 375, 2),
    Case("8B, long pairs", (32, 8, 128), 2, 8192, 1400, 1300, 2),
    Case("1B, HelpSteer2", (32, 8, 64), 8, 4096, 180, 375, 2),
)
TINY = (Case("tiny", (4, 2, 16), 2, 192, 20, 30, 2), Case("tiny, 4", (2, 2, 8), 3, 160, 8, 14, 4))


# ---- rows ----------------------------------------------------------------------------------------


class Stretches(NamedTuple):
    """Stretches of queries, each with the stretch of keys it sees; -1 where a row has fewer.

    S is rows times the most stretches of a row; stretches that are there count first, row by row.

    Attributes:
      queries: first position and length of each, [2 B M].
      keys: likewise of the keys.
      number: each token's stretch as a query, counted through all rows; S for none, [B L].
      place: its place in the stretch, [B L].
      seen: whether it is a key of a stretch, [B L].
    """

    queries: Any
    keys: Any
    number: Any
    place: Any
    seen: Any


def make_rows(case: Case, seed: int = 0) -> tuple[Layout, Stretches, Stretches]:
    """The layout of rows that are filled in turn; each part to itself, responses to prompts."""
    rng = np.random.default_rng(seed)
    zeros: Any = np.zeros((3, case.rows, case.length), np.int32)
    layout = Layout(*zeros)
    own: list[list[tuple[int, int, int, int]]] = [[] for _ in range(case.rows)]
    to_prompt: list[list[tuple[int, int, int, int]]] = [[] for _ in range(case.rows)]
    for row in range(case.rows):
        start = 0
        for group in range(1, case.length):
            prompt, *parts = (
                max(1, int(mean * rng.uniform(0.5, 1.5)))
                for mean in (case.prompt, *[case.response] * case.responses)
            )
            if start + prompt + sum(parts) > case.length:
                break
            place = end = start + prompt
            own[row].append((start, prompt, start, prompt))
            for part in parts:
                layout.masked_start[row, place : place + part] = end
                layout.masked_end[row, place : place + part] = place
                own[row].append((place, part, place, part))
                place += part
            to_prompt[row].append((end, place - end, start, prompt))
            layout.segment_ids[row, start:place] = group
            start = place
    return layout, _stretches(own, case.length), _stretches(to_prompt, case.length)


def _stretches(rows: list[list[tuple[int, int, int, int]]], length: int) -> Stretches:
    most = max(2, *map(len, rows))  # of one a row, cuDNN's call would be another
    queries, keys = np.full((2, 2, len(rows), most), -1, np.int32)
    number = np.full((len(rows), length), len(rows) * most, np.int32)
    place = np.zeros((len(rows), length), np.int32)
    seen = np.zeros((len(rows), length), bool)
    count = 0
    for row, stretches in enumerate(rows):
        for m, (start, size, first, known) in enumerate(stretches):
            queries[:, row, m], keys[:, row, m] = (start, size), (first, known)
            number[row, start : start + size] = count
            place[row, start : start + size] = np.arange(size)
            seen[row, first : first + known] = True
            count += 1
    return Stretches(queries, keys, number, place, seen)


# ---- two calls -----------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """Attention within stretches, and its gradients at a given result and log-sum-exp.

    Attributes:
      forward: of q, k, v, the stretches and whether it is causal; gives the result, and the
        log-sum-exp of each stretch's queries, [S N L].
      backward: of these, with result, log-sum-exp and cotangent; gives dq, dk, dv.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def two_calls(
    kernel: Kernel, own: Stretches, to_prompt: Stretches, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Every part to itself, responses to their prompts, merged; 0 in padding."""
    calls = ((own, True), (to_prompt, False))

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        results, sums = [], []
        for stretches, causal in calls:
            out, stats = kernel.forward(q, k, v, stretches, causal)
            there = (stretches.number < len(stats))[:, :, None]
            found = stats.at[stretches.number, :, stretches.place].get(mode="clip")
            sums.append(jnp.where(there, found, -jnp.inf))
            # What belongs to no stretch was never written.
            results.append(jnp.where(there[..., None], out.astype(jnp.float32), 0.0))
        total = jnp.logaddexp(*sums)
        total = jnp.where(jnp.isfinite(total), total, 0.0)
        merged = sum(x * jnp.exp(s - total)[..., None] for x, s in zip(results, sums))
        return jnp.asarray(merged).astype(q.dtype), total

    def backward(kept: tuple, by: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v, out, total = kept
        found = []
        for stretches, causal in calls:
            _, length, heads = total.shape
            stats = jnp.zeros((stretches.queries[0].size, heads, length), jnp.float32)
            stats = stats.at[stretches.number, :, stretches.place].set(total, mode="drop")
            gradients = kernel.backward(q, k, v, out, stats, by, stretches, causal)
            asked = stretches.number < len(stats)
            found.append(
                [
                    jnp.where(there[:, :, None, None], x.astype(jnp.float32), 0.0)
                    for there, x in zip((asked, stretches.seen, stretches.seen), gradients)
                ]
            )
        return tuple((a + b).astype(x.dtype) for a, b, x in zip(*found, (q, k, v)))

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return forward(q, k, v)[0]

    def first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
        out, total = forward(q, k, v)
        return out, (q, k, v, out, total)

    attend.defvjp(first, backward)
    return attend(q, k, v)


def cudnn_kernel() -> Kernel:
    """cuDNN's, for packed stretches (Hopper and later), below JAX's public functions."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def told(stretches: Stretches) -> list[jax.Array]:
        """Lengths and first positions, of which JAX wants one column more."""
        (start, size), (first, known) = stretches.queries, stretches.keys
        starts = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (start, first))
        return [jnp.asarray(size), jnp.asarray(known), *starts]

    def mask(causal: bool) -> Any:
        return cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, stretches: Stretches, causal: bool
    ) -> Any:
        return cudnn.dot_product_attention(
            q,
            k,
            v,
            None,
            None,
            *told(stretches),  # pyright: ignore[reportArgumentType]
            scale=q.shape[-1] ** -0.5,
            mask_type=mask(causal),
            return_residual=True,
        )

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        stats: jax.Array,
        by: jax.Array,
        stretches: Stretches,
        causal: bool,
    ) -> Any:
        none = jnp.zeros(0, q.dtype)
        kept = (q, k, v, none, *told(stretches), none, none, stats, out)
        version, layout = cudnn.check_cudnn_version(), cudnn.AttentionLayout.BTNH.value
        scale, seed, dropout, bias, window = q.shape[-1] ** -0.5, 42, 0.0, (False, False), None
        rule = cudnn._dot_product_attention_bwd_rule
        settings = (scale, seed, dropout, bias, mask(causal), layout, window, version, False)
        return rule(*settings, kept, by)[:3]

    return Kernel(forward, backward)


def stand_in() -> Kernel:
    """What `cudnn_kernel` must give, by its definition, all pairs at once."""

    def weights(
        q: jax.Array, k: jax.Array, stretches: Stretches, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        there = stretches.queries[1].ravel() >= 0
        order = np.argsort(~there, kind="stable")
        first, known = (np.append(x.ravel()[order], 0) for x in stretches.keys)
        first, known = (jnp.asarray(x)[stretches.number][..., None] for x in (first, known))
        ahead = jnp.arange(q.shape[1])[None, None] - first
        mask = (ahead >= 0) & (ahead < known) & (stretches.number < there.size)[..., None]
        if causal:
            mask &= ahead <= jnp.asarray(stretches.place)[..., None]
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        logits = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
        return logits, jnp.broadcast_to(mask[:, None], logits.shape)

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, stretches: Stretches, causal: bool
    ) -> Any:
        logits, mask = weights(q, k, stretches, causal)
        total = jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1)
        p = jnp.where(mask, jnp.exp(logits - total[..., None]), 0.0)
        out = jnp.einsum("bnqk,bknh->bqnh", p, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))
        # Like a kernel, it leaves what is not asked for unwritten.
        asked = (stretches.number < stretches.queries[0].size)[:, :, None, None]
        stats = jnp.full((stretches.queries[0].size, q.shape[2], q.shape[1]), jnp.nan)
        stats = stats.at[stretches.number, :, stretches.place].set(
            total.swapaxes(1, 2), mode="drop"
        )
        return jnp.where(asked, out, jnp.nan), stats

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        stats: jax.Array,
        by: jax.Array,
        stretches: Stretches,
        causal: bool,
    ) -> Any:
        logits, mask = weights(q, k, stretches, causal)
        total = stats.at[stretches.number, :, stretches.place].get(mode="clip").swapaxes(1, 2)
        p = jnp.where(mask, jnp.exp(logits - total[..., None]), 0.0)
        groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
        wide_k, wide_v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        mean = jnp.einsum("bqnh,bqnh->bnq", by, out)[..., None]
        by_logits = p * (jnp.einsum("bqnh,bknh->bnqk", by, wide_v) - mean) * scale

        def summed(x: jax.Array) -> jax.Array:
            return x.reshape(*k.shape[:3], groups, -1).sum(3)

        return (
            jnp.einsum("bnqk,bknh->bqnh", by_logits, wide_k),
            summed(jnp.einsum("bnqk,bqnh->bknh", by_logits, q)),
            summed(jnp.einsum("bnqk,bqnh->bknh", p, by)),
        )

    return Kernel(forward, backward)


# ---- the sides -----------------------------------------------------------------------------------

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def by_xla(layout: Layout, own: Stretches, to_prompt: Stretches) -> Attend:
    """rmjax's fallback."""
    return lambda q, k, v: dispatch.attention(q, k, v, layout)


def by_cudnn(layout: Layout, own: Stretches, to_prompt: Stretches) -> Attend:
    """rmjax's kernel on GPUs."""
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    implementation = "cudnn" if ON_GPU else "xla"
    plan = gpu_cudnn.make_plan(layout, sharding, implementation=implementation)
    return plan.attend


def by_two_calls(layout: Layout, own: Stretches, to_prompt: Stretches) -> Attend:
    """cuDNN's, for stretches."""
    kernel = cudnn_kernel() if ON_GPU else stand_in()
    return functools.partial(two_calls, kernel, own, to_prompt)


def by_tokamax(implementation: str, layout: Layout, own: Stretches, to_prompt: Stretches) -> Attend:
    """One of tokamax's, told the first key of each query beside the mask."""
    names: list[str] = ["xprof", "xprof.cli", "xprof.cli.tools"]
    for name in names:  # a profiler of 30 MB, which tokamax imports and attention does not use
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[names[-1]].__dict__.setdefault("get_kernel_stats_tool", None)
    from tokamax._src.ops.attention import base  # pyright: ignore[reportMissingImports]
    from tokamax._src.ops.attention.api import (  # pyright: ignore[reportMissingImports]
        IMPLEMENTATIONS,
    )

    places = jnp.arange(layout.segment_ids.shape[1])
    seen = sees(layout, places, layout.keys, places) | jnp.eye(len(places), dtype=bool)[None]
    same = layout.segment_ids[:, 1:] == layout.segment_ids[:, :-1]
    begins = jnp.pad(~same | (layout.segment_ids[:, 1:] == 0), ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, places[None], 0), axis=1)
    mask = base.Mask(seen[:, None], k_start=first[:, None].astype(jnp.int32), is_causal=True)
    compute = IMPLEMENTATIONS[implementation if ON_GPU else "xla"]
    return lambda q, k, v: compute(q, k, v, mask=mask)


SIDES: dict[str, Callable[[Layout, Stretches, Stretches], Attend]] = {
    "xla": by_xla,
    "cudnn": by_cudnn,
    "tokamax, Triton": functools.partial(by_tokamax, "triton"),
    "tokamax, Mosaic": functools.partial(by_tokamax, "mosaic_gpu"),
    "cudnn, two calls": by_two_calls,
}


# ---- what is measured ----------------------------------------------------------------------------


def seconds(work: Callable[..., Any], arguments: tuple, repeat: int, calls: int) -> float:
    """Of one call, when several are queued: the median of `repeat` rounds."""
    jax.block_until_ready(work(*arguments))
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        jax.block_until_ready([work(*arguments) for _ in range(calls)])
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


class Inputs(NamedTuple):
    """What every side gets of a case, and what float32 makes of it."""

    layout: Layout
    stretches: tuple[Stretches, Stretches]
    arrays: tuple[jax.Array, ...]
    expected: list[np.ndarray]


def programs(side: str, told: Inputs) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The result; and the result with the gradients by q, k and v."""

    def once(layout: Layout, stretches: Any, q: Any, k: Any, v: Any, by: Any) -> jax.Array:
        return SIDES[side](layout, *stretches)(q, k, v)

    def both(layout: Layout, stretches: Any, q: Any, k: Any, v: Any, by: Any) -> tuple:
        out, pull = jax.vjp(SIDES[side](layout, *stretches), q, k, v)
        return out, *pull(by)

    # The stretches' sizes are shapes, so they are constants of the program, as in no real use.
    stretches = told.stretches
    return (
        jax.jit(lambda layout, *arrays: once(layout, stretches, *arrays)),
        jax.jit(lambda layout, *arrays: both(layout, stretches, *arrays)),
    )


def make_inputs(case: Case) -> Inputs:
    """Random arrays that are exact in the kernels' dtype, and `xla` of them in float32."""
    layout, *stretches = make_rows(case)
    layout = jax.tree.map(jnp.asarray, layout)
    rng, (heads, kv_heads, size) = np.random.default_rng(1), case.heads
    dtype = jnp.bfloat16 if ON_GPU else jnp.float32
    real = (np.asarray(layout.segment_ids) > 0)[:, :, None, None]
    q, k, v, by = (
        jnp.asarray(rng.normal(size=(case.rows, case.length, n, size)).astype(np.float32), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    arrays = (q, k, v, jnp.where(real, by, 0).astype(dtype))
    told = Inputs(layout, (stretches[0], stretches[1]), arrays, [])
    with jax.default_matmul_precision("highest"):
        found = programs("xla", told)[1](layout, *(x.astype(jnp.float32) for x in arrays))
    return told._replace(expected=[np.asarray(x) for x in found])


def apart(found: tuple[jax.Array, ...], told: Inputs) -> float:
    """The largest error of the result and the gradients, relative to the norm of each."""
    real = (np.asarray(told.layout.segment_ids) > 0)[:, :, None, None]
    errors = []
    for ours, theirs in zip(found, told.expected, strict=True):
        difference = np.where(real, np.asarray(ours, np.float32) - theirs, 0)
        errors.append(np.linalg.norm(difference) / np.linalg.norm(np.where(real, theirs, 0)))
    return float(np.max(errors))


def main() -> int:
    """Prints the table; 1 if a kernel of rmjax's own is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="queued at once")
    args = parser.parse_args()
    inputs = {case: make_inputs(case) for case in (CASES if ON_GPU else TINY)}
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", end="\n\n")
    print("| rows | pairs seen | kernel | forward, ms | with backward, ms | xla / this | error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed, fallback = False, {}
    # One kernel after the other: after a fault of one on the device nothing else is computed there.
    for side in SIDES:
        for case, told in inputs.items():
            shown = f"{case.name}, {case.rows} x {case.length:,}"
            try:
                once, both = programs(side, told)
                arguments = (told.layout, *told.arrays)
                error = apart(both(*arguments), told)
                forward, total = (
                    seconds(work, arguments, args.repeat, args.calls) for work in (once, both)
                )
            except Exception as found:  # whatever a kernel raises that is not there
                why = " ".join(f"{type(found).__name__}: {found}".split())[:160].replace("|", "/")
                print(f"| {shown} | | {side} | absent: {why} | | | |", flush=True)
                failed |= side in OURS
                continue
            fallback.setdefault(case, total)
            wrong = not error < TOLERANCE
            failed |= wrong and side in OURS
            share = seen_share(told.layout)
            print(
                f"| {shown} | {share:.0%} | {side} | {forward * 1e3:.2f} | {total * 1e3:.2f} | "
                f"{fallback[case] / total:.2f} | {error:.1e}{' WRONG' if wrong else ''} |",
                flush=True,
            )
    return int(failed)


def seen_share(layout: Layout) -> float:
    """Pairs of tokens that see each other, of those that causality allows in full rows."""
    ids, start, end = map(np.asarray, layout[:3])
    rows, length = ids.shape
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1)
    seen = np.where(ids > 0, np.arange(length) - first + 1 - (end - start), 0)
    return seen.sum() / (rows * length * (length + 1) / 2)


if __name__ == "__main__":
    sys.exit(main())
