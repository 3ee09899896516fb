"""General preferences: numbers by hand and numpy, rock, paper and scissors, a model's forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rmjax
from helpers.runs import numbers, parts, run, tiny_config
from helpers.targets import bradley_terry, only_pairs
from rmjax.config import PreferenceConfig
from rmjax.convert import hf_to_orbax, orbax_to_hf
from rmjax.data.batch import Pairs
from rmjax.data.planning import row_shape
from rmjax.errors import UserError
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.inference.scores import Comparison, Score
from rmjax.models.init import random_params
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.training.experiment import config_objective
from rmjax.training.objectives.objective import make_objective
from rmjax.training.validate_config import validate
from rmjax.training.validation import evaluate

RULE = GeneralPreference()
GAMES = (("rock", "scissors"), ("scissors", "paper"), ("paper", "rock"))  # the first one wins
NUMBERS = st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3)


def by_matrix(a: np.ndarray, b: np.ndarray) -> float:
    """a^T R b / .1 of vectors of length 1, R written out."""
    r = np.kron(np.eye(len(a) // 2), [[0, 1], [-1, 0]])
    return float(a / np.linalg.norm(a) @ r @ b / np.linalg.norm(b) / 0.1)


def pairs_of(chosen, rejected, strengths=None, weights=None) -> Pairs:
    ones = np.ones(len(chosen), np.float32)
    slots = (np.asarray(x, np.int32) for x in (chosen, rejected))
    given = (ones if x is None else np.asarray(x, np.float32) for x in (weights, strengths))
    return Pairs._make([*slots, *given])


def loss_of(scores, pairs: Pairs, **preference) -> jax.Array:
    names = tuple(f"v{i}" for i in range(scores.shape[1]))
    objective = make_objective("general_preference", names, PreferenceConfig(**preference))
    targets = only_pairs(pairs, *scores.shape)
    return objective.loss(scores, targets, objective.weights(targets))


# ---- the form ---------------------------------------------------------------------------------


def test_by_hand():
    """A right angle is a margin of 10, whatever the lengths; two blocks share a length."""
    assert RULE.margins(np.asarray([2.0, 0]), np.asarray([0, 0.5])) == pytest.approx(10)
    assert RULE.margins(np.asarray([3.0, 4]), np.asarray([4, -3.0])) == pytest.approx(-10)
    sixth = np.asarray([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert RULE.margins(np.asarray([1.0, 0]), sixth) == pytest.approx(5)
    one, other = np.asarray([1.0, 0, 1, 0]), np.asarray([0, 1.0, 0, -1])
    assert RULE.margins(one, other) == pytest.approx(0)
    assert RULE.margins(one, np.abs(other)) == pytest.approx(10)
    assert float(loss_of(jnp.asarray([[1.0, 0], sixth]), pairs_of([0], [1]))) == pytest.approx(
        math.log1p(math.exp(-5)), rel=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(vectors=st.integers(1, 3).flatmap(lambda k: st.lists(
    st.lists(NUMBERS, min_size=2 * k, max_size=2 * k), min_size=2, max_size=6)))  # fmt: skip
def test_margins_are_the_matrix_product_and_antisymmetric(vectors):
    for kind in (np.float64, np.float32):
        v = np.asarray(vectors, kind)
        found = RULE.margins(v[:, None], v[None])
        np.testing.assert_array_equal(found, -found.T)
        expected = [[by_matrix(a.astype(float), b.astype(float)) for b in v] for a in v]
        np.testing.assert_allclose(found, expected, atol=1e-5 if kind is np.float32 else 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    vectors=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=2, max_size=2),
    strength=st.integers(0, 2),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_the_loss_is_the_cross_entropy_of_the_margin(vectors, strength, smoothing):
    v = np.asarray(vectors)
    margin, p = by_matrix(*v), 1 - smoothing if strength else 0.5
    expected = p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)
    pair = pairs_of([0], [1], [strength])
    found = loss_of(jnp.asarray(v, jnp.float32), pair, label_smoothing=smoothing)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_empty_slots_and_vectors_of_no_length_give_finite_gradients():
    scores = jnp.asarray([[1.0, 2.0], [2.0, -1.0], [np.inf, np.nan], [0.0, 0.0]])
    pairs = pairs_of([0, 2, 3], [1, 3, 3], weights=[1, 0, 1])
    found, gradient = jax.value_and_grad(loss_of)(scores, pairs)
    assert float(found) == pytest.approx((math.log1p(math.exp(10)) + math.log(2)) / 2)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)


def test_free_vectors_learn_what_rewards_cannot():
    """Rock, paper, scissors: three right answers with 120 degrees between them; rewards learn none.

    Margins of rewards around a cycle sum to 0, so that the mean of -log sigmoid is at least log 2.
    """
    pairs = pairs_of([0, 1, 2], [1, 2, 0])

    def general(scores):
        return loss_of(scores, pairs)

    def rewards(scores):
        targets = only_pairs(pairs, 3, 1)
        return bradley_terry.loss(scores, targets, bradley_terry.weights(targets))

    def learned(loss, columns):
        scores = jax.random.normal(jax.random.key(0), (3, columns))
        optimizer = optax.adam(0.05)

        def step(carry, _):
            scores, state = carry
            updates, state = optimizer.update(jax.grad(loss)(scores), state)
            return (optax.apply_updates(scores, updates), state), None

        (scores, _), _ = jax.lax.scan(step, (scores, optimizer.init(scores)), length=400)
        return scores

    v = np.asarray(learned(general, 2), np.float64)
    margins = [by_matrix(v[i], v[(i + 1) % 3]) for i in range(3)]
    np.testing.assert_allclose(margins, 10 * math.sin(2 * math.pi / 3), rtol=1e-2)
    r = np.asarray(learned(rewards, 1))[:, 0]
    assert min(r[i] - r[(i + 1) % 3] for i in range(3)) <= 0
    assert float(rewards(r[:, None])) == pytest.approx(math.log(2), abs=1e-4)


# ---- values of n responses ---------------------------------------------------------------------


def test_values_are_mean_margins(rng):
    scores = rng.normal(size=(2, 5, 4)).astype(np.float32)
    found = RULE.values(scores)
    assert found.dtype == np.float64 and found.shape == (2, 5)
    for values, v in zip(found, scores.astype(np.float64)):
        expected = [sum(by_matrix(a, b) for b in v if b is not a) / 5 for a in v]
        np.testing.assert_allclose(values, expected, atol=1e-9)
    two = RULE.values(scores[:, :2])
    np.testing.assert_array_equal(
        two[:, 0] - two[:, 1], RULE.margins(*scores.astype(np.float64)[:, :2].swapaxes(0, 1))
    )
    assert np.isnan(RULE.values(scores[:, :1])).all()


def test_values_order_what_has_an_order_and_tie_a_cycle():
    angles = np.asarray([0.0, 0.5, 1.0, 1.5])  # each is preferred over those at larger angles
    line = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert (np.diff(RULE.values(line)) < 0).all()
    angles = np.arange(3) * 2 * math.pi / 3
    np.testing.assert_allclose(
        RULE.values(np.stack([np.cos(angles), np.sin(angles)], 1)), 0, atol=1e-9
    )


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """Three pairs of responses to one prompt, trained on and held out."""
    file = tmp_path_factory.mktemp("games") / "games.jsonl"
    rows = [
        {"prompt": "Your hand?", "chosen": a, "rejected": b, "split": split}
        for split in ("train", "validation")
        for a, b in GAMES
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    last = dict(eval_every=0, checkpoint_every=0)  # only the last step
    return dict(data__train=str(file), data__validation=str(file), steps=60) | last


@pytest.fixture(scope="module")
def forms(games, tmp_path_factory):
    """A run, its export, that as an Orbax model."""
    root = tmp_path_factory.mktemp("general")
    changes = games | dict(
        objective="general_preference",
        data__attributes=("v1", "v2", "v3", "v4"),
        batch_size=6,
    )
    config = tiny_config(root / "run", **changes)
    config.optimizer.learning_rate = 1e-3
    run(config)
    orbax_to_hf(str(root / "run"), str(root / "hf"))
    hf_to_orbax(str(root / "hf"), str(root / "orbax"))
    return [root / "run", root / "hf", root / "orbax"]


def test_a_run_learns_a_cycle(forms):
    last = numbers(forms[0])[-1]
    assert last["pairs/accuracy"] == 1 and last["validation_loss"] < 1e-3
    spec = json.loads((forms[0] / "model" / "rmjax.json").read_text())
    assert spec["general_preference"] == {"beta": 0.1} and spec["scalar"] == {}


@pytest.mark.slow
def test_rewards_of_the_same_model_do_not(games, tmp_path):
    changes = games | dict(objective="bradley_terry", data__attributes=("r",), batch_size=6)
    config = tiny_config(tmp_path / "run", **changes)
    config.optimizer.learning_rate = 1e-3
    run(config)
    last = numbers(tmp_path / "run")[-1]
    assert last["pairs/accuracy"] <= 2 / 3 and last["validation_loss"] >= math.log(2) - 1e-6


def test_every_form_of_the_model_compares(forms):
    scorers = [rmjax.load(str(path)) for path in forms]
    for winner, loser in GAMES:
        found = [rm.compare("Your hand?", winner, loser) for rm in scorers]
        assert [c.preferred for c in found] == ["a"] * 3
        a, b = (np.asarray(list(s.attributes.values())) for s in (found[0].a, found[0].b))
        assert found[0].margin == pytest.approx(by_matrix(a, b))
        for comparison in found[1:]:
            assert comparison.margin == pytest.approx(found[0].margin, abs=1e-4)
        back = scorers[0].compare("Your hand?", loser, winner)
        assert back.margin == pytest.approx(-found[0].margin, abs=1e-4) and back.preferred == "b"
    same = scorers[0].compare("Your hand?", "rock", "rock")
    assert same.preferred == "tie" and same.probability is None  # all pairs were right: no T


def test_one_response_has_no_value(forms):
    rm = rmjax.load(str(forms[1]))
    talk = [{"role": "user", "content": "Your hand?"}, {"role": "assistant", "content": "rock"}]
    score = rm.score(talk)
    assert math.isnan(score.value) and score.rule == "general_preference"
    assert rm.rule == RULE and len(score.attributes) == 4
    with pytest.raises(UserError, match="value = 'v1': this is a model of general preferences"):
        rmjax.load(str(forms[1]), value="v1")


def test_what_is_shown_says_none_where_there_is_none():
    one = Score({"v1": 1.0, "v2": 0.0}, math.nan, RULE.name, 4)
    other = Score({"v1": 0.0, "v2": 1.0}, math.nan, RULE.name, 4)
    assert (
        repr(one).splitlines()[-1] == "value                none   (general_preference; 4 tokens)"
    )
    assert repr(Comparison(one, other, 10.0)).splitlines()[-2:] == [
        "value                none     none +10.0000",
        "preferred: a   (value: general_preference)",
    ]


def test_evaluation_judges_pairs_by_their_margin():
    config = tiny_config(
        "unused",
        objective="general_preference",
        data__compare="helpfulness",
        data__attributes=("v1", "v2", "v3", "v4"),
        data__row_length=256,
    )
    model, _, held = parts(config)
    assert held is not None and held.chosen is not None
    batches = evaluation_batches(held, row_shape(held, rows=2, length=256))
    params, score, sharding = random_params(model, 1), make_score(model), model.options.sharding
    found = evaluate(score, params, batches, np.full(4, np.nan), config_objective(config), sharding)
    v = score_data(score, params, batches, sharding).astype(np.float64)
    margins = np.asarray([by_matrix(v[i], v[i + 1]) for i in np.flatnonzero(held.chosen)])
    assert found.pairs is not None and found.pairs.attribute == "general_preference"
    assert found.pairs.mean_margin == pytest.approx(margins.mean())
    assert found.pairs.accuracy == pytest.approx((margins > 0).mean())
    assert found.loss == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(data__attributes=("a", "b", "c")), "needs an even number of them"),
        (dict(objective="general_preference + bradley_terry"), "cannot be summed"),
        (dict(preference__attribute="v1"), "neither a column of its own nor"),
        (dict(preference__center_rewards_coefficient=0.1), "and center_rewards_coefficient = 0.1"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, said):
    defaults = dict(objective="general_preference", data__attributes=("v1", "v2"))
    with pytest.raises(UserError, match=said):
        validate(tiny_config("unused", **(defaults | changes)))
