"""Forward and backward time of attention: dense, by XLA, and by the kernel for this hardware.

    python benchmarks/attention.py [--shape=smollm2] [--repeat=7]

Rows are as in training: prompts with two responses each, of varying lengths. All sides are compiled
first and then timed in turns, so that a busy machine is busy for all; the fastest of the repeats is
printed. `dense` is the definition: one product, one mask, one softmax.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.models.attention import dispatch
from rmjax.models.attention.dispatch import attention
from rmjax.models.attention.mask import Layout, sees
from rmjax.models.decoder_config import DecoderConfig
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of a model, and (rows, token positions of a row) to measure."""

    heads: int
    kv_heads: int
    head_dim: int
    rows: tuple[tuple[int, int], ...]


SHAPES = {
    "smollm2": Shape(9, 3, 64, ((4, 512), (4, 1024), (2, 2048))),
    "8b": Shape(32, 8, 128, ((4, 2048), (2, 4096), (1, 8192))),
}


def make_layout(
    rng: np.random.Generator, rows: int, length: int, mean: int, align: int
) -> tuple[Layout, float]:
    """Rows of segments of about `mean` tokens, and the share of causal pairs that are seen."""
    segment_ids, masked_start, masked_end = np.zeros((3, rows, length), np.int32)
    seen = 0
    for row in range(rows):
        place = 0
        for group in range(1, length):
            sizes = rng.uniform(0.5, 1.5, 3) * mean / 3
            shared, *own = np.maximum(1, sizes / align).astype(int) * align
            if place + shared + sum(own) > length:
                break
            start, end = place, place + shared
            place = end
            seen += shared * (shared + 1) // 2
            for size in own:
                masked_start[row, place : place + size] = end
                masked_end[row, place : place + size] = place
                place += size
                seen += size * shared + size * (size + 1) // 2
            segment_ids[row, start:place] = group
    layout = Layout(*map(jnp.asarray, (segment_ids, masked_start, masked_end)))
    return layout, seen / (rows * length * (length + 1) // 2)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """The definition."""
    places = jnp.arange(q.shape[1])
    mask = sees(layout, places, layout.keys, places)[:, None]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits).astype(q.dtype), v)


def timed(sides: dict, arguments: tuple, repeat: int) -> dict[str, float]:
    """Seconds of each side, the fastest of `repeat` rounds."""
    for side in sides.values():
        jax.block_until_ready(side(*arguments))
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeat):
        for name, side in sides.items():
            began = time.perf_counter()
            jax.block_until_ready(side(*arguments))
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def measure(shape: Shape, rows: int, length: int, mean: int, repeat: int) -> None:
    """Prints a line of Markdown for each side."""
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    decoder = DecoderConfig(1, 1, 1, 1, shape.heads, shape.kv_heads, shape.head_dim, length, 1e-5)
    kernel = dispatch.choose("auto", decoder, sharding, dtype, length)
    rng = np.random.default_rng(0)
    align = dispatch.alignment(kernel, length, decoder)
    layout, seen = make_layout(rng, rows, length, mean, align)
    sizes = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, by = (
        jnp.asarray(rng.normal(size=(rows, length, n, shape.head_dim)), dtype) for n in sizes
    )
    by = by * (layout.segment_ids > 0)[:, :, None, None].astype(dtype)

    def side(name: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
        if name == "dense":
            return dense(q, k, v, layout)
        return attention(q, k, v, dispatch.prepare(name, layout, sharding))

    def gradients(name: str, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> tuple:
        return jax.vjp(lambda q, k, v: side(name, q, k, v, layout), q, k, v)[1](by)

    names = dict.fromkeys(("dense", "xla", kernel))
    both = {name: jax.jit(functools.partial(gradients, name)) for name in names}
    once = {name: jax.jit(functools.partial(side, name)) for name in names}
    forward = timed(once, (q, k, v, layout), repeat)
    total = timed(both, (q, k, v, layout), repeat)
    for name in names:
        print(
            f"| {rows} x {length:,} | {mean} | {seen:.0%} | {name} | {forward[name] * 1e3:.1f} | "
            f"{total[name] * 1e3:.1f} | {total['xla'] / total[name]:.2f} |",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    print(f"{jax.devices()[0].device_kind}, {arguments.shape}: {shape.heads} heads", flush=True)
    print(
        "| rows | tokens a segment | pairs seen | | forward, ms | with backward, ms | xla / this |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows, length in shape.rows:
        for mean in (250, length // 2):
            measure(shape, rows, length, mean, arguments.repeat)


if __name__ == "__main__":
    main()
