"""Which implementation of attention is taken, and that all of them are the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layouts import dense, dense_gradients, make_layout, random_rows
from helpers.models import make_model, one_device, tiny_llama
from rmjax.errors import UserError
from rmjax.models.attention import cpu_flash, dispatch, gpu_cudnn, splash_mask
from rmjax.models.attention.dispatch import attention
from rmjax.models.init import random_params
from rmjax.models.inputs import Rows
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

BFLOAT16 = jnp.dtype("bfloat16")


@pytest.fixture
def on(monkeypatch):
    """Makes meshes look as if they were of other devices."""
    return lambda kind: monkeypatch.setattr(dispatch, "platform", lambda sharding: kind)


def choose(wanted="auto", dtype=BFLOAT16, length=512, sharding=None, **decoder):
    return dispatch.choose(wanted, tiny_llama(**decoder), sharding or one_device(), dtype, length)


def test_hardware_decides(on, caplog):
    assert choose() == choose(dtype=jnp.float32, length=511) == "cpu_flash"
    on("tpu")
    assert choose() == "splash" and choose(length=0) == "splash"
    on("gpu")
    assert choose() == "cudnn"
    assert choose("xla") == "xla"
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("tpu", {"length": 1000}, "1000 positions is not a multiple of 128"),
        ("tpu", {"head_dim": 12}, "head_dim = 12"),
        ("gpu", {"dtype": jnp.float32}, "dtype is float32"),
        ("gpu", {"head_dim": 256}, "head_dim = 256"),
        ("gpu", {"length": 32768}, "32768 positions are longer than 16384"),
        ("gpu", {"length": 511}, "odd"),
    ],
)
def test_what_no_kernel_can_do_falls_back_aloud_or_is_an_error(kind, changes, reason, on, caplog):
    on(kind)
    dispatch._warn.cache_clear()
    assert choose(**changes) == choose(**changes) == "xla"
    assert choose(**changes) == "xla"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.getMessage()
    name = {"tpu": "splash", "gpu": "cudnn"}[kind]
    with pytest.raises(UserError, match=f"attention = '{name}': .*{reason}.* 'xla'"):
        choose(name, **changes)


def test_a_kernel_for_other_hardware_is_an_error():
    with pytest.raises(UserError, match=r"attention = 'splash': it is for TPUs.* of CPUs"):
        choose("splash")
    with pytest.raises(UserError, match=r"attention = 'cudnn': it is for GPUs.* of CPUs"):
        choose("cudnn")


def test_rows_are_made_to_fit(on):
    sharding = Sharding(make_mesh(MeshConfig(fsdp=4, context=2)))
    assert (
        dispatch.row_multiple("xla", sharding) == dispatch.row_multiple("cpu_flash", sharding) == 2
    )
    assert dispatch.row_multiple("splash", sharding) == 256
    decoder = tiny_llama()
    assert dispatch.alignment("splash", 8192, decoder) == splash_mask.alignment(8192) == 16
    for name in ("xla", "cudnn"):
        assert dispatch.alignment(name, 8192, decoder) == 1


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"fsdp": 1, "context": 4}], ids=str)
def test_cudnns_mask_means_the_layout(mesh, rng):
    """The same call with XLA's operations: this checks what the kernel is told, not the kernel."""
    sharding = Sharding(make_mesh(MeshConfig(**mesh), jax.devices()[:4]))
    rows = [*random_rows(rng, 3, 96, 1), [(20, [10, 30]), (0, [9])]]
    layout, seen = make_layout(rows, 96, 1)
    shapes = [(4, 96, n, 8) for n in (4, 2, 2, 4)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = cotangent * real

    def both(q, k, v, layout):
        plan = gpu_cudnn.make_plan(layout, sharding, implementation="xla")
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan), q, k, v)
        return out, pull(cotangent)

    out, gradients = jax.jit(both)(q, k, v, layout)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out) * real, dense(q, k, v, seen), atol=2e-5)
    for ours, theirs in zip(gradients, dense_gradients(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [96, 300, 2304])
@pytest.mark.parametrize("name", ["xla", "cpu_flash"])
def test_xlas_ways_equal_dense_attention_and_its_gradients(name, length, rng):
    layout, seen = make_layout(random_rows(rng, 1, length, 1), length, 1)
    shapes = [(1, length, n, 8) for n in (2, 1, 1, 2)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = cotangent * real
    placed = jax.tree.map(jnp.asarray, layout)
    plan = dispatch.prepare(name, placed, one_device())
    with jax.numpy_dtype_promotion("strict"):
        out, pull = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, plan)), q, k, v)
    np.testing.assert_allclose(np.asarray(out) * real, dense(q, k, v, seen), atol=2e-5)
    expected = dense_gradients(q, k, v, seen, cotangent)
    for ours, theirs in zip(pull(cotangent), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 40, 130, 256]),
    rows=st.sampled_from([1, 3]),
)
def test_tiles_of_random_rows(seed, length, rows):
    rng = np.random.default_rng(seed)
    layout, seen = make_layout(random_rows(rng, rows, length, 1), length, 1)
    check_tiles(layout, seen, one_device(), rng)


@pytest.mark.parametrize("mesh", [dict(fsdp=2, context=2, tensor=2), dict(context=4)], ids=str)
def test_tiles_on_meshes(mesh, rng):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    sharding = Sharding(make_mesh(MeshConfig(**({"fsdp": 1} | mesh)), devices))
    layout, seen = make_layout(random_rows(rng, 4, 200, 1), 200, 1)  # 50 or 100 places a device
    check_tiles(layout, seen, sharding, rng)


def check_tiles(layout, seen, sharding, rng):
    rows, length = layout.segment_ids.shape
    shapes = [(rows, length, n, 8) for n in (4, 2, 2, 4)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent = cotangent * real
    out, gradients = by_tiles(sharding)(q, k, v, layout, cotangent)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out) * real, dense(q, k, v, seen), atol=2e-5)
    for ours, theirs in zip(gradients, dense_gradients(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@functools.cache
def by_tiles(sharding):
    """The result and the gradients by q, k and v, compiled once for each shape."""

    def both(q, k, v, layout, cotangent):
        plan = cpu_flash.make_plan(layout, sharding)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan), q, k, v)
        return out, pull(cotangent)

    return jax.jit(both)


def test_tiles_skip_what_nobody_sees(rng):
    """NaNs there would spread. Each row skips for itself, and a sibling in front is skipped."""
    layout, _ = make_layout([[(0, [128]), (0, [192])], [(64, [128, 128])]], 320, 1)
    plan = jax.jit(lambda x: cpu_flash.make_plan(x, one_device()))(layout)
    needed = [row[:count] for row, count in zip(plan.needed.tolist(), plan.count.tolist())]
    assert needed[:5] == [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert needed[5:] == [[5], [5, 6], [5, 6, 7], [5, 8], [5, 8, 9]]
    shapes = [(2, 320, n, 8) for n in (4, 2, 2, 4)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    k[0, :128], v[0, :128], k[1, 64:192], v[1, 64:192] = np.nan, np.nan, np.nan, np.nan
    out, (by_q, _, _) = by_tiles(one_device())(q, k, v, layout, cotangent)
    assert np.isnan(out[0, :128]).all() and np.isnan(out[1, 64:192]).all()
    for found in (out, by_q):
        assert np.isfinite(found[0, 128:]).all() and np.isfinite(found[1, 192:]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "remat"),
    [({"fsdp": 1}, "none"), ({"fsdp": 2, "context": 2, "tensor": 2}, "full")],
    ids=str,
)
def test_a_model_is_the_same_with_the_kernel(mesh, remat, rng):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    sharding = Sharding(make_mesh(MeshConfig(**mesh), devices))
    layout, _ = make_layout([[(40, [30, 70]), (0, [50])], [(10, [100, 90])]], 256, 1)
    tokens = rng.integers(1, 262, (2, 256)).astype(np.int32)
    positions = np.broadcast_to(np.arange(256, dtype=np.int32), (2, 256))
    ends = np.asarray([[69, 139, 189], [109, 199, 0]], np.int32)
    rows = Rows._make([tokens, layout.segment_ids, positions, *layout[1:3], ends])
    decoder = tiny_llama(num_hidden_layers=2)
    params = random_params(make_model(decoder, sharding=sharding), seed=1)

    def scores_and_gradient(name):
        model = make_model(decoder, sharding=sharding, attention=name, remat=remat)

        def total(params):
            scores = model(params, rows)
            return (scores[0] ** 2).sum(), scores

        return jax.jit(jax.grad(total, has_aux=True))(params)

    expected = jax.tree.leaves(scores_and_gradient("xla"))
    for name in ("splash", "cpu_flash"):
        for ours, plain in zip(jax.tree.leaves(scores_and_gradient(name)), expected, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)
