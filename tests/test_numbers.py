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
from rmjax.checkpoints.conversion.engine import _check_finite
from rmjax.checkpoints.manager import Checkpoints
from rmjax.config import PreferenceConfig
from rmjax.convert import hf_to_orbax
from rmjax.data.batch import Pairs
from rmjax.data.fields import rating_field
from rmjax.errors import UserError
from rmjax.evaluation.score_cache import ScoreCache
from rmjax.models import quantization
from rmjax.training.config_file import load_config
from rmjax.training.objectives.pairs import OF_MARGINS
from rmjax.training.objectives.policies import OF_POLICY_PAIRS
from rmjax.training.validate_config import validate


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
        for value in (math.nan, math.inf, -math.inf):
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
