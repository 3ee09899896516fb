"""Windows and soft caps in every kernel, against attention written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layouts import dense, dense_gradients, make_layout, random_rows
from helpers.models import one_device, tiny_llama
from rmjax.errors import UserError
from rmjax.models.attention import cpu_flash, dispatch, gpu_cudnn, splash_mask, tpu_splash
from rmjax.models.attention.dispatch import attention
from rmjax.models.attention.mask import Layout
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

ROWS, LENGTH, WINDOW = 2, 256, 70
CAPS = {"xla": 0.8, "cpu_flash": 0.8, "splash": 0.8, "cudnn": None}


def make_plan(name, layout, sharding, window=WINDOW):
    if name == "xla":
        return layout
    if name == "cpu_flash":
        return cpu_flash.make_plan(layout, sharding)
    if name == "splash":
        return tpu_splash.make_plan(layout, sharding, block=128, window=window, interpret=True)
    return gpu_cudnn.make_plan(layout, sharding, implementation="xla")


@functools.cache
def both(name, sharding, cap):
    """The result and the gradients by q, k and v, compiled once for each kernel."""

    def of(q, k, v, layout, cotangent):
        plan = make_plan(name, layout, sharding)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, plan, cap), q, k, v)
        return out, pull(cotangent)

    return jax.jit(of)


def tensors(rng):
    shapes = [(ROWS, LENGTH, n, 8) for n in (4, 2, 2, 4)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(name, rng, rows, sharding, window=WINDOW):
    layout, seen = make_layout(rows, LENGTH, 1, window)
    q, k, v, cotangent = tensors(rng)
    real = (layout.segment_ids > 0)[:, :, None, None]
    cotangent, cap = cotangent * real, CAPS[name]
    out, gradients = both(name, sharding, cap)(q, k, v, layout, cotangent)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out) * real, dense(q, k, v, seen, cap), atol=2e-5)
    expected = dense_gradients(q, k, v, seen, cotangent, cap)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.parametrize("name", CAPS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_rows_equal_dense_attention_and_its_gradients(name, seed):
    rng = np.random.default_rng(seed)
    check(name, rng, random_rows(rng, ROWS, LENGTH, 1), one_device())


# Windows that end in a prompt, in a sample's own part, and reach from this into that.
ENDS = [[(100, [20, 90]), (0, [40])], [(10, [80, 5, 120])]]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPS)
def test_on_a_mesh(name, rng):
    mesh = MeshConfig(fsdp=2, context=2, tensor=2)
    check(name, rng, ENDS, Sharding(make_mesh(mesh)))


def test_what_lies_before_every_window_is_not_touched(rng):
    """NaNs there would spread. Tiles are of 64, and the last to see one of the first is 132."""
    layout, _ = make_layout([[(0, [256])], [(0, [60]), (64, [64, 64])]], LENGTH, 1, WINDOW)
    q, k, v, cotangent = tensors(rng)
    clean, _ = both("cpu_flash", one_device(), CAPS["cpu_flash"])(q, k, v, layout, cotangent)
    k[0, :64], v[0, :64] = np.nan, np.nan
    spoilt, _ = both("cpu_flash", one_device(), CAPS["cpu_flash"])(q, k, v, layout, cotangent)
    np.testing.assert_array_equal(spoilt[0, 192:], clean[0, 192:])
    np.testing.assert_array_equal(spoilt[1], clean[1])
    assert np.isnan(spoilt[0, :192]).all()


def test_blocks_outside_of_windows_are_skipped():
    layout, seen = make_layout([[(0, [512])]], 512, 1, 100)
    layout = jax.tree.map(jnp.asarray, layout)
    plan = tpu_splash.make_plan(layout, one_device(), block=128, window=100, interpret=True)
    needed = seen.reshape(4, 128, 4, 128).any(axis=(1, 3))
    np.testing.assert_array_equal(plan.steps, needed)
    assert needed.sum() == 7  # of the 10 that causality leaves
    tiles = cpu_flash.make_plan(layout, one_device())
    np.testing.assert_array_equal(tiles.count, seen.reshape(8, 64, 8, 64).any((1, 3)).sum(1))


def test_windows_that_a_number_cannot_say_give_no_number():
    """A gap between a prompt and what follows it; or a window of another length."""
    q, k, v, cotangent = tensors(np.random.default_rng(0))
    run = both("splash", one_device(), CAPS["splash"])
    gap, _ = make_layout([[(10, [100])], []], LENGTH, 4, WINDOW)
    other, _ = make_layout([[(0, [100])], []], LENGTH, 4, WINDOW - 1)
    for layout in (gap, other):
        out, _ = run(q, k, v, layout, cotangent)
        assert np.isnan(out[layout.segment_ids > 0]).all()


@pytest.mark.parametrize("length", [128, 2048, 4096, 8192, 131072])
def test_a_number_holds_a_window_too(length, rng):
    unit, window = splash_mask.alignment(length, True), length // 3
    places = np.append(rng.integers(0, length, 200), [0, length - 1]).astype(np.int32)
    ends = rng.integers(0, places // unit + 1) * unit
    starts = rng.integers(0, ends // unit + 1) * unit
    has = rng.integers(0, 2, len(places))
    arrays = [np.asarray(x, np.int32)[None] for x in (places, starts, ends, places, has)]
    numbers = splash_mask.query_numbers(Layout._make(arrays), jnp.asarray(places), length, True)[0]
    keys = rng.integers(0, length, 300).astype(np.int32)
    found = splash_mask.mask_function(length, 1, window)(numbers[:, None], jnp.asarray(keys)[None])
    places, starts, ends = places[:, None], starts[:, None], ends[:, None]
    shown = (keys <= places) & ~((keys >= starts) & (keys < ends))
    back = places - keys - np.where(keys < starts, ends - starts, 0)
    np.testing.assert_array_equal(found, shown & ((back < window) | (has[:, None] == 0)))


def test_alignment_has_room_for_a_window():
    assert [splash_mask.alignment(n, True) for n in (1024, 2048, 4096, 8192)] == [1, 2, 8, 16]
    decoder = tiny_llama(family="mistral", sliding_window=4096)
    assert dispatch.alignment("splash", 4096, decoder) == 4  # no sample is longer than its window
    assert dispatch.alignment("splash", 8192, decoder) == 16
    assert dispatch.alignment("splash", 4096, tiny_llama()) == 4


def test_a_soft_cap_is_named_where_a_kernel_has_none(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda sharding: "gpu")
    decoder = tiny_llama(family="gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(UserError, match=r"attention = 'cudnn': .*attn_logit_softcapping is 50"):
        dispatch.choose("cudnn", decoder, one_device(), jnp.bfloat16, 512)
    assert dispatch.choose("auto", decoder, one_device(), jnp.bfloat16, 512) == "xla"
