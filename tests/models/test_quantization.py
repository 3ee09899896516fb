import functools
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix

import rmjax
from helpers.hf_models import TALK, save_hf
from helpers.models import make_model, one_device, score_array, tiny_llama
from rmjax.errors import UserError
from rmjax.inference.score_step import make_score
from rmjax.models import quantization
from rmjax.models.init import random_params
from rmjax.models.inputs import Rows
from rmjax.models.parameters import flatten
from rmjax.models.quantization import check_quantize, has_products, product, quantize_params
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh

LLAMA = tiny_llama(attention_bias=True)
KINDS = ("int8", "fp8")
NEAR = {"int8": 0.2, "fp8": 0.6}  # of the scores' standard deviation, three layers of 32


@pytest.fixture(scope="module", autouse=True)
def promotions_of_qwix():
    """qwix multiplies integers by scales; our own products promote nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwix, "einsum", jax.numpy_dtype_promotion("standard")(qwix.einsum))
        yield


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(0)
    none = np.zeros((4, 32), np.int32)
    places = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    ends = np.asarray([[31], [20], [9], [2]], np.int32)
    tokens = rng.integers(1, 256, (4, 32)).astype(np.int32)
    return Rows._make(map(jnp.asarray, (tokens, none + 1, places, none, none, ends)))


@functools.cache
def initial():
    return jax.tree.map(np.asarray, random_params(make_model(LLAMA), 1))


@functools.cache
def parameters(sharding: Sharding, kind: str = ""):
    model = make_model(LLAMA, sharding=sharding)
    abstract = make_model(LLAMA, 5, sharding).abstract()
    params = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), initial(), abstract)
    return model, quantize_params(params, sharding, kind) if kind else params


def rounded(x: np.ndarray, kind: str, axes: tuple[int, ...]) -> np.ndarray:
    """`x` in 8 bits and back, by hand: one scale for all places along `axes`."""
    most = np.abs(x).max(axis=axes, keepdims=True).astype(np.float64)
    scale = np.where(most > 0, most, 1.0) / {"int8": 127, "fp8": 448}[kind]
    if kind == "int8":
        return np.rint(x / scale) * scale
    return (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale


# ---- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "equation", "summed"),
    [
        ("layers/q", "bld,dnh->blnh", (0,)),
        ("layers/o", "blnh,nhd->bld", (0, 1)),
        ("layers/down", "blf,fd->bld", (0,)),
    ],
)
def test_a_product_equals_numpys(path, equation, summed, kind, native, rng, monkeypatch):
    """In 8 bits as the chips do it (which a CPU can too, slowly) and emulated."""
    monkeypatch.setattr(quantization, "has_products", lambda mesh, kind: native)
    _, plain = parameters(one_device())
    weights = np.asarray(flatten(plain)[path])
    weight = jax.tree.map(lambda x: x[1], flatten(parameters(one_device(), kind)[1])[path])
    inner = equation.split(",")[0][2:]
    x = rng.normal(size=(2, 5, *(weights[1].shape[: len(inner)]))).astype(np.float32)
    x[0, 0] = 0  # padding may be all zeros
    x[1] *= 100  # each token has its own scale
    expected = np.einsum(
        equation,
        rounded(x, kind, tuple(range(2, x.ndim))),
        rounded(weights[1], kind, summed),
    )
    found = product(equation, jnp.asarray(x), weight, one_device().mesh)
    assert found.dtype == jnp.float32
    size = np.abs(expected).max(axis=tuple(range(2, expected.ndim)), keepdims=True)
    assert (np.abs(found - expected) <= 1e-5 * size).all()
    exact = np.einsum(equation, x, weights[1])
    assert np.abs(expected - exact).max() > 1e-3 * np.abs(exact).max()  # it did round


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_near_and_the_same_emulated_and_sharded(kind, rows, monkeypatch):
    model, plain = parameters(one_device())
    expected = np.asarray(make_score(model)(plain, rows))
    _, params = parameters(one_device(), kind)
    found = np.asarray(make_score(model)(params, rows))
    gap = np.abs(found - expected).max() / expected.std()
    assert 1e-3 < gap < NEAR[kind]

    sharding = Sharding(make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()))
    sharded, params_of_eight = parameters(sharding, kind)
    gate = flatten(params_of_eight)["layers/gate"]
    assert gate.qvalue.sharding.shard_shape(gate.qvalue.shape) == (3, 8, 32)
    assert gate.scale.sharding.shard_shape(gate.scale.shape) == (3, 1, 32)
    np.testing.assert_allclose(make_score(sharded)(params_of_eight, rows), found, atol=1e-5)

    monkeypatch.setattr(quantization, "has_products", lambda mesh, kind: True)
    native = jax.jit(lambda params, rows: model(params, rows))
    text = native.lower(params, rows).as_text()
    assert text.count("xi8>" if kind == "int8" else "xf8E4M3FN>") > 7
    np.testing.assert_allclose(native(params, rows), found, atol=1e-5)


def test_the_layers_weights_take_a_byte_each_and_the_rest_is_untouched(rows):
    _, plain = parameters(one_device())
    _, params = parameters(one_device(), "int8")
    before, after = flatten(plain), flatten(params)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        if "norm" in path or path in ("embed", "head") or path.endswith("bias"):
            np.testing.assert_array_equal(leaf, before[path])
        else:
            assert leaf.qvalue.shape == before[path].shape and leaf.qvalue.dtype == jnp.int8
            assert leaf.scale.dtype == jnp.float32 and leaf.scale.size * 8 <= leaf.qvalue.size


def test_the_weights_given_are_freed():
    plain = jax.tree.map(jnp.array, initial())
    quantize_params(plain, one_device(), "fp8")
    assert plain["layers"]["gate"].is_deleted() and not plain["embed"].is_deleted()


# ---- loading ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_load_scores_in_8_bits_and_off_by_default(tmp_path):
    path = save_hf(tmp_path, tiny_llama(max_position_embeddings=256))
    plain = rmjax.load(str(path))
    assert all(isinstance(x, jax.Array) for x in flatten(plain.params).values())
    expected = score_array(plain.score_many(TALK))
    with pytest.warns(UserWarning, match="'int8': cpu has no such products.*slowly") as caught:
        scorer = rmjax.load(str(path), quantize="int8")
    assert caught[0].filename == __file__
    found = score_array(scorer.score_many(TALK))
    assert 1e-3 < np.abs(found - expected).max() / expected.std() < NEAR["int8"]


def test_the_default_imports_no_library_and_changes_no_program(rows, monkeypatch):
    model, params = parameters(one_device())
    monkeypatch.setitem(sys.modules, "qwix", None)
    check_quantize("", one_device())
    text = make_score(model).lower(params, rows).as_text()
    assert "i8>" not in text and "f8E4M3FN>" not in text


def test_what_is_unknown_or_missing_is_said(monkeypatch):
    with pytest.raises(UserError, match="quantize = 'int4': there are '', 'int8', 'fp8'"):
        check_quantize("int4", one_device())
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"quantize.*pip install 'rmjax\[quantize\]'"):
        check_quantize("int8", one_device())


@pytest.mark.parametrize(
    ("platform", "name", "capability", "int8", "fp8"),
    [
        ("tpu", "TPU v4", None, False, False),
        ("tpu", "TPU v5 lite", None, True, False),
        ("tpu", "TPU v5", None, True, False),
        ("tpu", "TPU v6 lite", None, True, False),
        ("tpu", "TPU7x", None, False, True),
        ("gpu", "NVIDIA V100", "7.0", False, False),
        ("gpu", "NVIDIA A100", "8.0", True, False),
        ("gpu", "NVIDIA H100", "9.0", True, True),
        ("gpu", "NVIDIA B200", "10.0", True, True),
        ("gpu", "AMD Instinct", "gfx942", False, False),
        ("cpu", "cpu", None, False, False),
    ],
)
def test_which_devices_have_products_in_8_bits(platform, name, capability, int8, fp8):
    device = types.SimpleNamespace(
        platform=platform, device_kind=name, compute_capability=capability
    )
    mesh = types.SimpleNamespace(devices=np.asarray([device]))
    assert [has_products(mesh, kind) for kind in KINDS] == [int8, fp8]  # type: ignore[arg-type]
