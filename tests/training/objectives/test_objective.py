"""Objectives against numbers worked by hand, numpy in float64, and TRL's loss."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.targets import only_pairs, regression
from rmjax.config import PreferenceConfig
from rmjax.data.batch import Pairs, Ratings, Targets
from rmjax.errors import UserError
from rmjax.training.objectives.objective import make_objective, parse_objective

ATTRIBUTES = ("helpfulness", "verbosity", "reward")


def pairs(strengths, weights=None) -> Pairs:
    """Pairs of slots 0 and 1, 2 and 3, ..."""
    strengths = np.asarray(strengths, np.float32)
    first = 2 * np.arange(len(strengths), dtype=np.int32)
    weights = np.ones_like(strengths) if weights is None else np.asarray(weights, np.float32)
    return Pairs._make([first, first + 1, weights, strengths])


def value(text, rewards, strengths, weights=None, **preference) -> float:
    """The objective `text` of one column of `rewards`, chosen and rejected in turn."""
    objective = make_objective(text, ("reward",), PreferenceConfig(**preference))
    scores = jnp.asarray(rewards, jnp.float32)[:, None]
    targets = only_pairs(pairs(strengths, weights), len(scores), 1)
    return float(objective.loss(scores, targets, objective.weights(targets)))


def by_numpy(
    name, rewards, strengths, smoothing=0.0, center_rewards_coefficient=0.0, ties="half"
) -> float:
    rewards, m = np.asarray(rewards, np.float64), np.asarray(strengths, np.float64)
    chosen, rejected = rewards[::2], rewards[1::2]
    margin = chosen - rejected - (m if name == "margin_bradley_terry" else 0)
    p = np.where(m == 0, 0.5, 1 - smoothing)
    log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    losses = -p * log_sigmoid(margin) - (1 - p) * log_sigmoid(-margin)
    if name == "scaled_bradley_terry":
        losses = m * losses
    losses = losses + center_rewards_coefficient * (chosen + rejected) ** 2
    weights = np.where((m == 0) & (ties == "zero_weight"), 0.0, 1.0)
    return float((weights * losses).sum() / max(weights.sum(), 1.0))


def test_by_hand():
    """log 2 without a margin; -log sigmoid(1) = .31326, -log sigmoid(-1) = 1.31326."""
    assert value("bradley_terry", [0, 0], [1]) == pytest.approx(math.log(2))
    assert value("bradley_terry", [3, 2], [1]) == pytest.approx(0.3132617)
    assert value("margin_bradley_terry", [3, 2], [2]) == pytest.approx(1.3132617)
    assert value("scaled_bradley_terry", [3, 2], [3]) == pytest.approx(3 * 0.3132617)
    smoothed = 0.9 * 0.3132617 + 0.1 * 1.3132617
    assert value("bradley_terry", [3, 2], [1], label_smoothing=0.1) == pytest.approx(smoothed)
    centred = 0.3132617 + 0.01 * 25
    assert value("bradley_terry", [3, 2], [1], center_rewards_coefficient=0.01) == pytest.approx(
        centred
    )


NAMES = ("bradley_terry", "margin_bradley_terry", "scaled_bradley_terry")


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    found=st.lists(
        st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 3)), min_size=1, max_size=6
    ),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    center_rewards_coefficient=st.sampled_from([0.0, 0.01]),
    ties=st.sampled_from(["half", "zero_weight"]),
)
def test_every_form_is_its_formula(name, found, smoothing, center_rewards_coefficient, ties):
    rewards = [x for chosen, rejected, _ in found for x in (chosen, rejected)]
    strengths = [m for _, _, m in found]
    loss = value(
        name,
        rewards,
        strengths,
        label_smoothing=smoothing,
        center_rewards_coefficient=center_rewards_coefficient,
        ties=ties,
    )
    expected = by_numpy(name, rewards, strengths, smoothing, center_rewards_coefficient, ties)
    assert loss == pytest.approx(expected, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["bradley_terry", "margin_bradley_terry"])
def test_it_is_the_loss_of_trl(name, rng):
    """Its `RewardTrainer.compute_loss` on the same scores, margins and centering."""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.reward_trainer", reason="needs rmjax[bench]")

    class Anything:
        def __getattr__(self, _):
            return Anything()

        def __call__(self, *args, **_):
            return args[0] if args else self

    rewards = rng.normal(size=(2, 8)).astype(np.float32)
    strengths = rng.integers(1, 4, 8).astype(np.float32)
    theirs: Any = Anything()
    theirs.model = type("Model", (), {"training": False})()
    theirs.args = type("Args", (), {"center_rewards_coefficient": 0.01})()
    theirs._metrics = {"eval": {key: [] for key in ("num_tokens", "min_reward", "mean_reward")}}
    theirs._metrics["eval"] |= {key: [] for key in ("max_reward", "accuracy", "margin")}
    theirs._total_train_tokens = 0
    inputs = {"margin": torch.from_numpy(strengths)} if name.startswith("margin") else {}
    outputs = type("Outputs", (), {"logits": torch.from_numpy(rewards.reshape(-1, 1))})()
    expected = trainer.RewardTrainer.compute_loss(theirs, lambda **_: outputs, inputs)
    found = value(name, rewards.T.ravel(), strengths, center_rewards_coefficient=0.01)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_empty_slots_reach_neither_the_loss_nor_the_gradient():
    objective = make_objective("scaled_bradley_terry", ("reward",), PreferenceConfig())
    targets = only_pairs(pairs([2, 1], weights=[1, 0]), 4, 1)

    def loss(scores):
        return objective.loss(scores, targets, objective.weights(targets))

    scores = jnp.asarray([[1.0], [2.0], [np.inf], [-np.inf]])
    found, gradient = jax.value_and_grad(loss)(scores)
    assert float(found) == pytest.approx(2 * 1.3132617)
    np.testing.assert_array_equal(gradient[2:], 0)
    assert np.isfinite(gradient).all() and (gradient[:2] != 0).all()


def test_ties_of_no_weight_are_not_counted_either():
    """A mean over the others, and of none it is 0 rather than NaN."""
    assert value("bradley_terry", [3, 2, 9, -9], [1, 0], ties="zero_weight") == pytest.approx(
        value("bradley_terry", [3, 2], [1])
    )
    assert value("bradley_terry", [9, -9], [0], ties="zero_weight") == 0
    assert value("bradley_terry", [1, 0], [0], ties="half") == pytest.approx(
        (0.3132617 + 1.3132617) / 2
    )


def test_a_sum_of_objectives_on_one_head(rng):
    """Each a mean of its own: ratings of two attributes, pairs on the third column."""
    objective = make_objective(
        "regression + 0.5 * bradley_terry", ATTRIBUTES, PreferenceConfig(attribute="reward")
    )
    scores = rng.normal(size=(6, 3)).astype(np.float32)
    labels = rng.normal(size=(6, 3)).astype(np.float32)
    present = np.zeros((6, 3), np.float32)
    present[4:, :2] = 1
    targets = Targets(Ratings._make([labels, present]), pairs([1, 1]))
    found = objective.loss(scores, targets, objective.weights(targets))
    squared = ((scores - labels)[4:, :2].astype(np.float64) ** 2).mean()
    expected = squared + 0.5 * by_numpy("bradley_terry", scores[:4, 2], [1, 1])
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "general_preference", "regression", "ordinal"])
def test_parts_of_a_batch_add_up(name, rng):
    """Micro-batches divide by the whole batch's weights."""
    objective = make_objective(name, ("a", "b"), PreferenceConfig())
    scores = rng.normal(size=(6, 2)).astype(np.float32)
    ratings = Ratings(*rng.integers((0, 0), (5, 2), (6, 2, 2)).T.swapaxes(1, 2).astype(np.float32))
    params = {"thresholds": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
    whole = Targets(ratings, pairs([1, 2, 3]))
    weights = objective.weights(whole)

    def part(i: int) -> float:
        own = slice(2 * i, 2 * i + 2)
        targets = Targets(Ratings(*(x[own] for x in ratings)), pairs([i + 1]))
        return float(objective.loss(scores[own], targets, weights, params))

    found = sum(part(i) for i in range(3))
    assert found == pytest.approx(float(objective.loss(scores, whole, weights, params)), rel=1e-5)


def test_a_margin_for_every_pair_is_asserted():
    targets = only_pairs(pairs([1, 2])._replace(strengths=np.ones((2, 2), np.float32)), 4, 1)
    objective = make_objective("margin_bradley_terry", ("reward",), PreferenceConfig())
    with pytest.raises(AssertionError):
        objective.loss(jnp.zeros((4, 1)), targets, jnp.ones(1))


def test_objectives_are_parsed():
    assert parse_objective("regression") == {"regression": 1.0}
    assert parse_objective(" 2 * regression+ .5*bradley_terry") == {
        "regression": 2.0,
        "bradley_terry": 0.5,
    }
    for text in ("", "regression +", "-1 * regression", "regression + regression", "0*regression"):
        with pytest.raises(UserError, match=r"config\.objective"):
            parse_objective(text)
    with pytest.raises(
        UserError, match=r"there are regression, ordinal, bradley_terry, margin_brad"
    ):
        parse_objective("bradley")


def test_needs_follow_from_the_names():
    assert regression.ratings and not regression.pairs
    both = make_objective("regression + scaled_bradley_terry", ATTRIBUTES, PreferenceConfig())
    assert (both.ratings, both.pairs, both.strengths, both.column) == (True, True, True, 0)
    named = make_objective("bradley_terry", ATTRIBUTES, PreferenceConfig(attribute="verbosity"))
    assert (named.strengths, named.column) == (False, 1)
    with pytest.raises(UserError, match=r"'helpful': config\.data.attributes has helpfulness"):
        make_objective("bradley_terry", ATTRIBUTES, PreferenceConfig(attribute="helpful"))
