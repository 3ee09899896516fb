"""The TPU kernel in Pallas' interpreter, against attention written out in numpy."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layouts import dense, dense_gradients, make_layout, random_rows
from helpers.models import one_device
from rmjax.models.attention import splash_mask, tpu_splash
from rmjax.models.attention.dispatch import attention
from rmjax.models.attention.mask import Layout
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'rmjax[aot]'",
)


def sharding_of(**mesh: int) -> Sharding:
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return Sharding(make_mesh(MeshConfig(**mesh), devices))


def tensors(rng, rows, length, heads=4, kv_heads=2, head_dim=8):
    """q, k, v and a cotangent."""
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def planner(sharding: Sharding, block: int):
    """The plan of a layout, compiled once for each shape."""
    return jax.jit(lambda x: tpu_splash.make_plan(x, sharding, block=block, interpret=True))


@functools.cache
def kernel(sharding: Sharding, block: int):
    """The result and the gradients by q, k and v, compiled once for each shape."""

    def both(q, k, v, layout, cotangent):
        plan = tpu_splash.make_plan(layout, sharding, block=block, interpret=True)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan), q, k, v)
        return out, pull(cotangent)

    return jax.jit(both)


def check(rows, length, sharding, block, rng):
    layout, seen = make_layout(rows, length, splash_mask.alignment(length))
    q, k, v, cotangent = tensors(rng, len(rows), length)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = cotangent * real  # nothing depends on padding
    out, gradients = kernel(sharding, block)(q, k, v, layout, cotangent)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out) * real, dense(q, k, v, seen), atol=2e-5)
    for ours, theirs in zip(gradients, dense_gradients(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([128, 256]))
def test_random_rows_equal_dense_attention_and_its_gradients(seed, block):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 2, 256, splash_mask.alignment(256))
    check(rows, 256, one_device(), block, rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "count", "block", "mesh"),
    [
        (384, 3, 128, {"fsdp": 1}),  # no power of two, several rows in one call
        (1024, 1, 256, {"fsdp": 1}),  # one row, so one kernel gives all gradients
        (512, 2, 128, {"fsdp": 2, "context": 2}),
        (1280, 1, 128, {"fsdp": 1}),  # but not in more than eight parts
        (512, 4, 128, {"fsdp": 2, "context": 2, "tensor": 2}),
        (512, 2, 128, {"fsdp": 1, "context": 4}),
        (256, 4, 128, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_blocks_rows_and_meshes(length, count, block, mesh, rng):
    rows = random_rows(rng, count - 1, length, splash_mask.alignment(length))
    rows.append([(length // 3, [length // 8, length // 4]), (0, [length // 8])])
    check(rows, length, sharding_of(**mesh), block, rng)


def test_bfloat16_is_near(rng):
    """Inputs exact in bfloat16, results within a few of its steps (2^-8 of a number)."""
    layout, seen = make_layout([[(100, [28, 128, 100]), (0, [100])]], 512, 1)
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in tensors(rng, 1, 512))
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = np.where(real, cotangent, 0).astype(jnp.bfloat16)
    out, gradients = kernel(one_device(), 128)(q, k, v, layout, cotangent)
    assert out.dtype == jnp.bfloat16
    expected = (dense(q, k, v, seen), *dense_gradients(q, k, v, seen, cotangent))
    for ours, theirs in zip((np.where(real, out, 0), *gradients), expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < 0.01


ROWS = [
    [(100, [28, 128, 100]), (0, [100])],  # blocks of 128: prompt + 1st, 2nd, 3rd + gap, other
    [(0, [300])],
]


def test_steps_by_hand():
    layout, seen = make_layout(ROWS, 512, 4)
    plan = planner(one_device(), 128)(layout)
    expected = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],  # padding visits itself
    ]
    np.testing.assert_array_equal(np.asarray(plan.steps).reshape(2, 4, 4), expected)
    needed = seen.reshape(2, 4, 128, 4, 128).any(axis=(2, 4))
    assert not (needed & ~np.asarray(expected, bool)).any()
    # Where a step is taken its own block is there, elsewhere that of the next one taken.
    taken = np.asarray(expected, bool).reshape(8, 4)
    found = np.asarray(plan.keys_next)
    own = np.arange(4) + 4 * (np.arange(8) // 4)[:, None]
    np.testing.assert_array_equal(found[taken], np.broadcast_to(own, (8, 4))[taken])
    following = np.append(found.ravel()[1:], found.ravel()[0])
    np.testing.assert_array_equal(found.ravel()[~taken.ravel()], following[~taken.ravel()])
    # The same for the queries of each block of keys.
    by_keys = taken.reshape(2, 4, 4).transpose(1, 0, 2).reshape(4, 8)
    found = np.asarray(plan.queries_next)
    own = np.arange(4)[:, None] + 4 * (np.arange(8) // 4)[None]
    np.testing.assert_array_equal(found[by_keys], own[by_keys])
    following = np.roll(found, -1, axis=0)
    np.testing.assert_array_equal(found[~by_keys], following[~by_keys])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_needed_step_is_left_out_and_no_other_taken(seed):
    rng = np.random.default_rng(seed)
    layout, seen = make_layout(random_rows(rng, 2, 512, 4), 512, 4)
    plan = planner(sharding_of(fsdp=2, context=2), 128)(layout)
    needed = seen.reshape(2, 4, 128, 4, 128).any(axis=(2, 4)) | np.eye(4, dtype=bool)
    np.testing.assert_array_equal(np.asarray(plan.steps).reshape(2, 4, 4), needed)


def test_a_block_that_is_not_needed_is_not_touched(rng):
    """What it holds is NaN, which a product with weights of 0 would spread."""
    layout, _ = make_layout([[(100, [28, 128, 100]), (0, [100])]], 512, 4)
    q, k, v, cotangent = tensors(rng, 1, 512)
    cotangent = cotangent * (layout.segment_ids > 0)[:, :, None, None]
    clean, gradients = kernel(one_device(), 128)(q, k, v, layout, cotangent)
    k[:, 128:256], v[:, 128:256] = np.nan, np.nan  # seen by the queries of that block alone
    spoilt, by_keys = kernel(one_device(), 128)(q, k, v, layout, cotangent)
    rest = np.r_[0:128, 256:512]
    np.testing.assert_array_equal(spoilt[:, rest], clean[:, rest])
    np.testing.assert_array_equal(by_keys[0][:, rest], gradients[0][:, rest])
    assert np.isnan(spoilt[:, 128:256]).all()
    # And queries: those of the second block are used for the keys of the first two.
    q, k, v, cotangent = tensors(np.random.default_rng(0), 1, 512)
    q[:, 128:256] = np.nan
    _, (_, dk, dv) = kernel(one_device(), 128)(q, k, v, layout, cotangent)
    assert np.isfinite(dk[:, 256:]).all() and np.isfinite(dv[:, 256:]).all()
    assert np.isnan(dk[:, :256]).all()


def test_a_layout_that_is_not_aligned_gives_no_number(rng):
    rows = [[(101, [30, 128])]]
    loose, _ = make_layout(rows, 2048, 1)
    fitting, _ = make_layout(rows, 2048, splash_mask.alignment(2048))
    q, k, v, cotangent = tensors(rng, 1, 2048)
    assert not np.isnan(kernel(one_device(), 512)(q, k, v, fitting, cotangent)[0]).any()
    found = kernel(one_device(), 512)(q, k, v, loose, cotangent)[0]
    assert np.isnan(found[loose.segment_ids > 0]).all()


@pytest.mark.parametrize("length", [128, 384, 4096, 5120, 8192, 32768, 131072])
def test_a_number_holds_place_and_interval(length, rng):
    unit = splash_mask.alignment(length)
    places = np.append(rng.integers(0, length, 200), [0, length - 1]).astype(np.int32)
    ends = rng.integers(0, places // unit + 1) * unit
    starts = rng.integers(0, ends // unit + 1) * unit
    arrays = [np.asarray(x, np.int32)[None] for x in (places, starts, ends)]
    layout = Layout._make([*arrays, None, None])
    numbers = splash_mask.query_numbers(layout, jnp.asarray(places), length)[0]
    keys = rng.integers(0, length, 300).astype(np.int32)
    for rows in (1, 3):
        at = keys + length * rng.integers(0, rows)
        found = splash_mask.mask_function(length, rows)(numbers[:, None], jnp.asarray(at)[None])
        hidden = (keys >= starts[:, None]) & (keys < ends[:, None])
        np.testing.assert_array_equal(found, (keys <= places[:, None]) & ~hidden)


def test_alignment_is_the_smallest_that_fits():
    assert [splash_mask.alignment(n) for n in (128, 1024, 1025, 2048, 4096)] == [1, 1, 2, 2, 4]
    assert [splash_mask.alignment(n) for n in (8192, 16384, 131072)] == [16, 32, 1024]


def test_what_it_cannot_do_it_says():
    assert not tpu_splash.unsupported(4096, 128, one_device())
    assert "1000 positions is not a multiple of 128" in tpu_splash.unsupported(
        1000, 128, one_device()
    )
    assert "head_dim = 12" in tpu_splash.unsupported(4096, 12, one_device())
    split = tpu_splash.unsupported(384, 64, sharding_of(fsdp=1, context=2))
    assert "2 devices (mesh axis context)" in split


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from rmjax.models.attention import tpu_splash
from rmjax.models.attention.dispatch import attention
from rmjax.models.attention.mask import Layout
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
jax.config.update("jax_platforms", "cpu")
for topology, mesh, (rows, length, heads, kv_heads, head_dim) in (
    ("v5p:2x2x1", dict(fsdp=1, tensor=4), (1, 4096, 64, 8, 128)),
    ("v5e:2x2", dict(fsdp=1, tensor=2, context=2), (4, 1024, 8, 2, 64)),
    ("v6e:2x2", dict(fsdp=4), (16, 1536, 9, 3, 64)),
    ("v6e:2x2", dict(fsdp=4), (4, 128, 4, 2, 8)),
):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = Sharding(make_mesh(MeshConfig(**mesh), devices))
    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.activation(axes))
    layout = Layout(*[array((rows, length), jnp.int32, "row", "length")] * 3)
    q, k = (
        array((rows, length, n, head_dim), jnp.bfloat16, "row", "length", "heads", "head_dim")
        for n in (heads, kv_heads)
    )
    def gradients(q, k, v, layout):
        plan = tpu_splash.make_plan(layout, sharding)
        return jax.grad(
            lambda *qkv: attention(*qkv, plan).astype(jnp.float32).sum(), (0, 1, 2)
        )(q, k, v)
    lowered = jax.jit(gradients).trace(q, k, k, layout).lower(lowering_platforms=("tpu",))
    stats = lowered.compile().memory_analysis()
    # Nothing of the size of all pairs of places: [heads, length, length] in two bytes.
    pairs = 2 * length**2 * rows * heads / len(devices)
    print(topology, stats.temp_size_in_bytes, pairs)
    assert length < 1024 or stats.temp_size_in_bytes < pairs / 2
"""


@needs_compiler
@pytest.mark.slow
def test_it_compiles_for_tpus():
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
