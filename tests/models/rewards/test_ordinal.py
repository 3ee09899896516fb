"""Ordinal ratings: the likelihood by hand and by scipy, runs that learn it, a model's forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.special import expit

import rmjax
from helpers.checks import known
from helpers.compiling import optimized
from helpers.hf_models import TALK, edit_json
from helpers.reference import torch_scores
from helpers.runs import numbers, parts, run, tiny_config
from helpers.targets import only_ratings
from rmjax.checkpoints.conversion.extrapolation import open_parents
from rmjax.checkpoints.manager import best_checkpoint
from rmjax.checkpoints.orbax_arrays import read_array
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import OptimizerConfig, PreferenceConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.batch import Pairs, Ratings, Targets
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import encode
from rmjax.errors import UserError
from rmjax.models.rewards.ordinal import OrdinalScale, negative_log_likelihood, ordered
from rmjax.runtime.sharding import MeshConfig, make_mesh
from rmjax.training.experiment import first_params
from rmjax.training.objectives.objective import make_objective
from rmjax.training.optimizer import make_optimizer
from rmjax.training.validate_config import validate

ZEROS = jnp.zeros((4, 1))  # thresholds -1.5, -.5, .5, 1.5
NAMES = ("helpfulness", "verbosity")
ORDINAL = dict(
    objective="ordinal",
    data__attributes=NAMES,
    data__train="generated:400",
    data__validation="generated:60",
    eval_every=0,
    checkpoint_every=80,
)


def loss_of(number: float, level: float, raw=ZEROS) -> float:
    found = negative_log_likelihood(jnp.full((1, 1), number), jnp.full((1, 1), level), raw)
    return float(found[0, 0])


def probabilities(number: float, theta: np.ndarray) -> np.ndarray:
    """Of each level, as written in the docstring: differences of the cumulative ones."""
    above = np.concatenate([[1.0], expit(number - theta), [0.0]])
    return above[:-1] - above[1:]


def thetas(raw: np.ndarray) -> np.ndarray:
    """Thresholds from the parameter, one column: softplus gaps of at least .01, 1 at zero."""
    shift = math.log(math.exp(0.99) - 1)
    gaps = [0.01 + math.log1p(math.exp(r + shift)) for r in raw[1:]]
    return np.cumsum([raw[0] - (len(raw) - 1) / 2, *gaps])


# ---- the loss ---------------------------------------------------------------------------------


def test_by_hand():
    """s(-1.5) = .18243, s(1.5) - s(.5) = .19511, s(.5) - s(-.5) = .24492."""
    np.testing.assert_allclose(ordered(ZEROS)[0][:, 0], [-1.5, -0.5, 0.5, 1.5], atol=1e-6)
    for level, p in enumerate([0.1824255, 0.1951150, 0.2449187, 0.1951150, 0.1824255]):
        assert loss_of(0.0, level) == pytest.approx(-math.log(p), rel=1e-5)
    assert loss_of(2.0, 4) == pytest.approx(-math.log(0.6224593), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    number=st.floats(-8, 8),
    raw=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_loss_and_its_gradient_are_those_of_the_levels_probability(number, raw, data):
    level = data.draw(st.integers(0, len(raw)))
    raw32 = jnp.asarray(raw, jnp.float32)[:, None]

    def by_scipy(x: np.ndarray) -> float:
        return -math.log(probabilities(x[0], thetas(x[1:]))[level])

    x = np.asarray([number, *raw])
    assert loss_of(number, level, raw32) == pytest.approx(by_scipy(x), rel=1e-4, abs=1e-5)
    gradient = jax.grad(loss_of_arrays, argnums=(0, 1))(jnp.float32(number), raw32, level)
    found = np.concatenate([[gradient[0]], gradient[1][:, 0]])
    expected = optimize.approx_fprime(x, by_scipy, 1e-6)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-3, atol=2e-4)


def loss_of_arrays(number, raw, level):
    return negative_log_likelihood(number.reshape(1, 1), jnp.full((1, 1), level), raw)[0, 0]


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(st.floats(-60, 60), min_size=1, max_size=8))
def test_thresholds_rise_whatever_the_parameter_and_lead_back_to_it(raw):
    column = np.asarray(raw, np.float32)[:, None]
    theta = np.asarray(ordered(jnp.asarray(column))[0])[:, 0]
    assert (np.diff(theta) > 0).all()
    scale = OrdinalScale(0, len(raw), ("x",)).with_raw(column, ("x",))
    np.testing.assert_allclose(scale.thresholds[0], theta, rtol=1e-4, atol=1e-3)
    again = OrdinalScale(0, len(raw), ("x",)).with_raw(scale.raw(("x",)), ("x",))
    np.testing.assert_allclose(again.thresholds, scale.thresholds, rtol=1e-5, atol=1e-4)


def test_scores_far_away_have_finite_losses_and_gradients():
    for number in (-1e4, 1e4):
        for level in range(5):
            found = jax.value_and_grad(loss_of_arrays)(jnp.float32(number), ZEROS, level)
            assert np.isfinite(found).all()
    assert loss_of(1e4, 0) == pytest.approx(1e4, rel=1e-3)


def test_the_expected_rating_is_the_mean_over_levels(rng):
    """Of ratings from 1 to 5, in the rated column alone."""
    raw = rng.normal(size=(4, 2)).astype(np.float32)
    scale = OrdinalScale(1, 5, ("b",)).with_raw(raw, ("a", "b"))
    scores = rng.normal(size=(7, 2)).astype(np.float32) * 4
    found = scale.read(scores, ("a", "b"))
    theta = thetas(raw[:, 1].astype(np.float64))
    expected = [probabilities(float(x), theta) @ [1, 2, 3, 4, 5] for x in scores[:, 1]]
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 0], scores[:, 0])


def test_missing_ratings_reach_neither_the_loss_nor_the_gradient():
    objective = make_objective("ordinal", ("x",), PreferenceConfig())
    labels = np.asarray([[3.0], [0.0]], np.float32)
    targets = only_ratings(Ratings._make([labels, np.asarray([[1.0], [0.0]], np.float32)]))
    weights = objective.weights(targets)

    def loss(scores, raw):
        return objective.loss(scores, targets, weights, {"thresholds": raw})

    scores = jnp.asarray([[1.0], [np.inf]])
    found, (of_scores, of_raw) = jax.value_and_grad(loss, argnums=(0, 1))(scores, ZEROS)
    assert float(found) == pytest.approx(loss_of(1.0, 3))
    assert of_scores[0, 0] != 0 and of_scores[1, 0] == 0 and np.isfinite(of_raw).all()


def test_in_a_sum_pairs_compare_the_heads_numbers(rng):
    """Ratings from 1 to 5 of the first column, pairs on the second, which has no thresholds."""
    config = PreferenceConfig(attribute="b")
    objective = make_objective("2 * ordinal + 0.5 * bradley_terry", ("a", "b"), config, (1, 5))
    assert objective.levels == (1, 5) and objective.ratings
    scores = rng.normal(size=(4, 2)).astype(np.float32)
    raw = rng.normal(size=(4, 2)).astype(np.float32)
    present = np.asarray([[0, 0], [0, 0], [1, 0], [1, 0]], np.float32)
    labels = np.asarray([[0, 0], [0, 0], [5, 0], [2, 0]], np.float32)
    pairs = Pairs._make(np.asarray([x], kind) for x, kind in zip((0, 1, 1, 1), "iiff"))
    targets = Targets(Ratings._make([labels, present]), pairs)
    weights = objective.weights(targets)
    found = objective.loss(scores, targets, weights, {"thresholds": jnp.asarray(raw)})
    theta = thetas(raw[:, 0].astype(np.float64))
    levels = [probabilities(float(scores[i, 0]), theta)[k] for i, k in ((2, 4), (3, 1))]
    expected = -2 * np.log(levels).mean() + 0.5 * np.logaddexp(0, scores[1, 1] - scores[0, 1])
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_thresholds_move_as_many_times_faster_as_the_head_is_wide():
    """AdamW's first step is the learning rate in the gradient's direction; no weight decays."""
    config = OptimizerConfig(0.01, warmup_steps=0, weight_decay=0.5, clip_norm=1e9)
    optimizer = make_optimizer(config, lambda step: jnp.float32(0.01), width=32)
    params = {"head": jnp.zeros((2, 1)), "thresholds": jnp.ones((2, 1))}
    grads = {"head": jnp.ones((2, 1)), "thresholds": jnp.asarray([[1.0], [-2.0]])}
    updates = jax.device_get(optimizer.update(grads, optimizer.init(params), params)[0])
    np.testing.assert_allclose(updates["head"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["thresholds"], [[-0.32], [0.32]], rtol=1e-5)


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 160 steps, in two parts."""
    workdir = tmp_path_factory.mktemp("ordinal") / "run"
    with optimized():
        for steps in (80, 160):
            config = tiny_config(workdir, **ORDINAL, steps=steps)
            config.optimizer.learning_rate = 3e-3
            run(config)
    return config


def scores_of(path) -> np.ndarray:
    return np.asarray([list(s.attributes.values()) for s in rmjax.load(str(path)).score_many(TALK)])


@pytest.fixture(scope="module")
def forms(trained, tmp_path_factory):
    """The run, its export, that as an Orbax model, and that exported again."""
    root = tmp_path_factory.mktemp("forms")
    orbax_to_hf(trained.workdir, str(root / "hf"))
    hf_to_orbax(str(root / "hf"), str(root / "orbax"))
    orbax_to_hf(str(root / "orbax"), str(root / "again"))
    return [trained.workdir, root / "hf", root / "orbax", root / "again"]


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_learns_ratings_and_where_their_levels_part(trained, tmp_path):
    """It continues as if it had never stopped; metrics are of expected ratings."""
    whole = tiny_config(tmp_path / "whole", **ORDINAL, steps=160)
    whole.optimizer.learning_rate = 3e-3
    run(whole)
    found = numbers(tmp_path / "whole")
    assert found[-1] == numbers(type(tmp_path)(trained.workdir))[-1]
    for name in NAMES:
        assert found[-1][f"{name}/mse"] < 0.7 * found[-1][f"{name}/mse_constant"]
    assert found[-1]["helpfulness/pearson"] > 0.9
    raw = read_array(best_checkpoint(tmp_path / "whole")[0] / "params", "thresholds")
    assert raw.shape == (4, 2) and raw.dtype == np.float32 and (np.abs(raw) > 0.05).any()


@pytest.mark.slow
def test_every_form_of_the_model_gives_the_expected_rating(forms):
    expected = scores_of(forms[0])
    assert ((expected > 0) & (expected < 4)).all()
    for path in forms[1:]:
        np.testing.assert_allclose(scores_of(path), expected, atol=1e-5)


def test_the_spec_has_the_thresholds_and_transformers_the_number_they_divide(forms, trained):
    """f by transformers, thresholds by hand from the run's parameter: the very scores, in order."""
    spec = json.loads((forms[1] / "rmjax.json").read_text())["ordinal"]
    raw = read_array(best_checkpoint(type(forms[1])(trained.workdir))[0] / "params", "thresholds")
    theta = np.stack([thetas(column) for column in raw.T.astype(np.float64)])
    np.testing.assert_allclose(spec.pop("thresholds"), theta, rtol=1e-9)
    assert spec == {"lowest": 0, "highest": 4, "attributes": list(NAMES)}
    tokenizer = open_pretrained(str(forms[1])).tokenizer()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        forms[1], dtype=torch.float32
    ).eval()
    numbers = torch_scores(model, [encode(tokenizer, Conversation(talk)) for talk in TALK]).astype(
        np.float64
    )
    found = scores_of(forms[1])
    np.testing.assert_allclose(found, expit(numbers[..., None] - theta).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(np.argsort(numbers, axis=0), np.argsort(found, axis=0))


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path):
    """Two runs of six steps: on one device, and on eight of all kinds."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    options = ORDINAL | dict(data__train="generated:64", data__validation="generated:16")
    run(tiny_config(tmp_path / "one", **options))
    run(tiny_config(tmp_path / "eight", **options, mesh=mesh), make_mesh=make_mesh)
    one, eight = (numbers(tmp_path / name)[-1] for name in ("one", "eight"))
    for name in ("validation_loss", "helpfulness/mse", "verbosity/mse"):
        assert eight[name] == pytest.approx(one[name], rel=1e-4)


def test_a_run_that_begins_from_an_ordinal_model_keeps_its_thresholds(forms):
    for path in forms[:3]:
        source = open_pretrained(str(path))
        config = tiny_config("unused", **ORDINAL)
        model = parts(config)[0]
        params, _ = first_params(config, source, model)
        assert params["thresholds"].shape == (4, len(NAMES))
        scale = known(known(source.spec).ordinal)
        again = scale.with_raw(np.asarray(params["thresholds"]), NAMES)
        np.testing.assert_allclose(again.thresholds, scale.thresholds, atol=1e-5)
        fresh, _ = first_params(config, source.without_head(), model)
        np.testing.assert_array_equal(fresh["thresholds"], 0)


@pytest.mark.slow
def test_lora_trains_thresholds_too(tmp_path):
    changes = ORDINAL | dict(data__train="generated:64", lora__rank=2, checkpoint_every=3)
    run(tiny_config(tmp_path / "run", **changes))
    raw = read_array(best_checkpoint(tmp_path / "run")[0] / "params", "thresholds")
    assert (raw != 0).all()
    orbax_to_hf(str(tmp_path / "run"), str(tmp_path / "hf"))
    np.testing.assert_allclose(scores_of(tmp_path / "hf"), scores_of(tmp_path / "run"), atol=1e-4)


def test_a_column_that_only_pairs_train_is_no_rating(tmp_path):
    changes = dict(
        objective="ordinal + scaled_bradley_terry",
        preference__attribute="reward",
        data__attributes=("helpfulness", "verbosity", "reward"),
        data__compare="helpfulness",
        data__pairs="generated:24",
        data__validation_pairs="generated:16",
    )
    run(tiny_config(tmp_path / "run", **changes))
    scale = known(known(open_pretrained(str(tmp_path / "run")).spec).ordinal)
    assert scale.attributes == NAMES and len(scale.thresholds) == 2
    last = numbers(tmp_path / "run")[-1]
    assert "pairs/accuracy" in last and "verbosity/mse" in last


# ---- errors -----------------------------------------------------------------------------------


def test_a_rating_between_levels_is_an_error(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r", "helpfulness": i / 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "data.jsonl")
    config = tiny_config(
        "unused",
        objective="ordinal",
        data__attributes=("helpfulness",),
        data__train=path,
        data__validation="",
        data__hold_out=0.5,
    )
    with pytest.raises(UserError, match=r"row 2.*'helpfulness' is rated 0\.5, and the levels"):
        parts(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(data__label_range=(0.0, 4.5)),
            r"label_range = \(0\.0, 4\.5\): the levels of",
        ),
        (dict(data__label_range=(4.0, 4.0)), r"label_range = \(4\.0, 4\.0\)"),
        (dict(objective="ordinal + regression"), "a rating or lies among thresholds, not both"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, said):
    with pytest.raises(UserError, match=said):
        validate(tiny_config("unused", **(ORDINAL | changes)))


def test_a_spec_with_too_few_thresholds_is_an_error(forms):
    spec = json.loads((forms[3] / "rmjax.json").read_text())["ordinal"]
    edit_json(forms[3] / "rmjax.json", ordinal=spec | {"thresholds": [[0, 1, 2]]})
    with pytest.raises(UserError, match=r"rmjax\.json: 'ordinal' must have 4 thresholds for each"):
        open_pretrained(str(forms[3]))


def test_thresholds_are_not_extrapolated(forms):
    with pytest.raises(UserError, match="thresholds of an ordinal objective"):
        open_parents(str(forms[1]), str(forms[2]))
