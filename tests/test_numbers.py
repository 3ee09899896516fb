"""Numbers at their edges: what is not finite stops, or is refused where it is read."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from helpers.hf_models import edit_tensors, save_hf
from helpers.layouts import make_layout
from rmjax.checkpoints.conversion.engine import _check_finite
from rmjax.checkpoints.manager import Checkpoints
from rmjax.config import PreferenceConfig
from rmjax.convert import hf_to_orbax
from rmjax.data.batch import Pairs
from rmjax.data.fields import rating_field
from rmjax.data.tokenized import in_memory
from rmjax.errors import UserError
from rmjax.evaluation.score_cache import ScoreCache
from rmjax.models import quantization
from rmjax.models.attention import cpu_flash
from rmjax.models.layers import rms_norm
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.config_file import load_config
from rmjax.training.objectives.objective import make_objective
from rmjax.training.objectives.pairs import OF_MARGINS
from rmjax.training.objectives.policies import OF_POLICY_PAIRS
from rmjax.training.validate_config import validate
from rmjax.training.validation import validation_metrics


@pytest.mark.parametrize("dtype", (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_a_weight_that_is_no_number_is_found_in_any_dtype(dtype, value):
    class Part:
        key = "a"

    block = np.zeros((2, 3), dtype)
    block[0] = [np.finfo(np.float16).max, -1e-7, -0.0]
    _check_finite(Part, block)  # pyright: ignore[reportArgumentType]
    block[1, 2] = value
    with pytest.raises(UserError, match=r"tensor 'a': 1 of 6 weights are not finite"):
        _check_finite(Part, block)  # pyright: ignore[reportArgumentType]


def test_a_model_with_a_weight_that_is_no_number_is_not_converted(tmp_path):
    model = save_hf(tmp_path / "model")
    edit_tensors(model, **{"model.norm.weight": torch.full((_width(model),), math.nan)})
    with pytest.raises(UserError, match=r"'model\.norm\.weight': .* weights are not finite"):
        hf_to_orbax(str(model), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _width(model) -> int:
    return json.loads((model / "config.json").read_text())["hidden_size"]


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, value):
    checkpoints = Checkpoints(tmp_path)
    items = {"params": {"a": jnp.zeros((2, 2)), "b": jnp.asarray([0.0, value], jnp.bfloat16)}}
    with pytest.raises(UserError, match=r"step 3: weights or optimizer are not finite"):
        checkpoints.save(3, items, position={}, config={}, evaluation=None)
    checkpoints.close()
    assert Checkpoints(tmp_path).latest is None


@pytest.mark.parametrize("line", ('{"w": NaN}', '{"w": 1e999}', "[]", '{"w": [1]}'))
def test_scores_on_disk_that_are_no_numbers_are_refused(tmp_path, line):
    path = tmp_path / "scores.jsonl"
    path.write_text(f'[{{"key": "k", "scores": {line}, "tokens": 1, "cut": 0}}]\n')
    with pytest.raises(UserError, match="not a line of this program's"):
        ScoreCache(path, ("w",))


@pytest.mark.parametrize("name", ("quickstart", "quickstart_dpo", "quickstart_align"))
def test_every_number_of_a_config_is_finite(name):
    config = validate(load_config(name))
    places = [*_floats(config, ())]
    assert len(places) > 15
    for place in places:
        for value in (math.nan, math.inf, -math.inf, 1e39, 1e-46):
            if place == ("data", "label_range") and value == math.inf:
                continue
            with pytest.raises(UserError, match=place[-1]):
                validate(_put(config, place, value))


def _floats(config, path):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _floats(value, (*path, field.name))
        elif isinstance(value, float) or (value and isinstance(value, tuple) and type(value[0]) is float):  # fmt: skip  # noqa: E501
            yield (*path, field.name)


def _put(config, path, value):
    old = getattr(config, path[0])
    if len(path) > 1:
        value = _put(old, path[1:], value)
    elif isinstance(old, tuple):
        value = (old[0], value)
    return dataclasses.replace(config, **{path[0]: value})


@pytest.mark.parametrize(
    ("value", "expected"),
    ((0, 0.0), (4, 4.0), (-100, None), (-100.0, None), (None, None), (math.nan, None), (-0.0, 0.0)),
)
def test_labels_at_the_edges(value, expected):
    found = rating_field({"a": value}, "a", "x row 1", (0.0, 4.0))
    assert math.isnan(found) if expected is None else found == expected


@pytest.mark.parametrize("value", (4.0000001, -1e-9, math.inf, -math.inf, 10**400, True, "4", [4]))
def test_labels_beyond_the_edges(value):
    with pytest.raises(UserError, match="x row 1: field 'a' is"):
        rating_field({"a": value}, "a", "x row 1", (0.0, 4.0))


@pytest.mark.parametrize("name", (*OF_MARGINS, *OF_POLICY_PAIRS))
def test_losses_of_pairs_at_extreme_margins(name):
    """As far as bfloat16 and 8 bits may put scores: a finite loss, and a finite gradient."""
    margins = jnp.asarray([0.0, 1e-30, 80.0, -80.0, 3e4, -3e4, 1e9, -1e9])
    ones, zeros = jnp.ones(8), jnp.zeros(8, jnp.int32)
    pairs: Pairs = Pairs._make([zeros, zeros, ones, ones])
    config = PreferenceConfig(beta=0.1, label_smoothing=0.1)

    def loss(x):
        return jnp.sum((OF_MARGINS | OF_POLICY_PAIRS)[name](x, pairs, config))

    value, gradient = jax.value_and_grad(loss)(margins)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize("value", (math.nan, math.inf, 0.0, 3e38))
def test_8_bits_hide_no_number_that_is_none(kind, value):
    qwix = pytest.importorskip("qwix")
    weight = jnp.ones((4, 2)).at[1, 0].set(value).at[:, 1].set(0.0)  # and a channel of zeros
    array = qwix.QArray(*quantization._rounded(weight, kind, (1,)), qtype=quantization._TYPES[kind])
    found = np.asarray(qwix.dequantize(array))
    assert np.isfinite(found[:, 0]).all() == math.isfinite(value)
    np.testing.assert_array_equal(found[:, 1], 0.0)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize("value", (math.nan, -math.inf))
def test_8_bits_hide_no_channel_that_is_none(kind, value):
    """XLA's largest of a column of NaN is -inf on a CPU, for some shapes and if it is optimized."""
    pytest.importorskip("qwix")
    weight = jnp.ones((2, 64, 32)).at[:, :, 0].set(value)
    rounded = jax.jit(quantization._rounded, static_argnums=(1, 2))
    scale = np.asarray(rounded(weight, kind, (0, 2))[1])
    assert np.isnan(scale[..., 0]).all() and np.isfinite(scale[..., 1:]).all()


@pytest.mark.parametrize("factor", (1e-30, 1.0, 1e18))
def test_a_norm_of_numbers_of_any_size(factor):
    x = np.linspace(-1, 2, 8, dtype=np.float32) * np.float32(factor)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean() + 1e-5)
    found = rms_norm(jnp.asarray(x), jnp.ones(8), 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("value", (1e20, 3e38, math.inf, math.nan))
def test_a_norm_whose_squares_are_no_float32_is_nan_and_not_0(value, dtype):
    found = rms_norm(jnp.asarray([1.0, value], dtype), jnp.ones(2), 1e-5)
    assert np.isnan(np.asarray(found, np.float32)).all()


@pytest.mark.optimized
def test_vectors_too_long_for_float32_are_not_as_good_as_each_other():
    margins = jax.jit(GeneralPreference().margins)
    one, other = np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]])
    for factor, expected in ((1e-3, 10.0), (1e18, 10.0), (1e20, math.nan)):
        found = margins(jnp.float32(factor * one), jnp.float32(factor * other))
        np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_logits_below_those_of_unseen_tokens_show_nothing_of_them():
    """A logit of -1e35 is still one, and what comes later weighs nothing beside it."""
    layout, _ = make_layout([[(0, [64])]], 64, 1)
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    plan = cpu_flash.make_plan(jax.tree.map(jnp.asarray, layout), sharding)
    q, k = jnp.full((1, 64, 1, 2), 1e17), jnp.full((1, 64, 1, 2), -1e18)
    v = jnp.arange(128.0).reshape(1, 64, 1, 2)
    found = np.asarray(plan.attend(q, k, v))[0, :, 0]
    expected = np.cumsum(np.asarray(v)[0, :, 0], axis=0) / np.arange(1, 65)[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_thresholds_far_apart_are_continued():
    scale = OrdinalScale(0, 3, ("a",), ((-1e4, 0.0, 2e3),))
    raw = scale.raw(("a",))
    assert np.isfinite(raw).all()
    np.testing.assert_allclose(scale.with_raw(raw, ("a",)).thresholds, scale.thresholds, atol=1e-2)


def test_a_held_out_loss_that_is_infinite_stops():
    data = dataclasses.replace(
        in_memory([np.arange(3, dtype=np.int32)], [0])[0],
        attributes=("a",),
        labels=np.asarray([[1e30]], np.float32),
    )
    objective = make_objective("regression", ("a",), PreferenceConfig())
    with pytest.raises(UserError, match="loss of 1 held-out samples is inf"):
        validation_metrics(np.zeros((1, 1), np.float32), data, np.zeros(1), objective)
