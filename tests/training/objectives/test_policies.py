"""What policies learn from: losses by numpy, and steps that use them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from helpers.models import one_device, tiny_llama
from rmjax.config import OptimizerConfig, PreferenceConfig
from rmjax.data.batch import Pairs, PolicyTargets, Responses
from rmjax.data.batches import iterate, training_batches
from rmjax.data.planning import row_shape
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import REFERENCE, TokenizedData, in_memory
from rmjax.errors import UserError
from rmjax.models.heads import LanguageModelHead
from rmjax.models.init import random_params
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.objectives.objective import Objective, make_policy_objective
from rmjax.training.step import make_program, scores_of

BETA = 0.1
# Two rows of three slots: a pair and an empty slot, then a pair and a sample by itself.
SCORES = np.asarray([[-20.0, -31.0, 1e9], [-12.0, -7.0, -40.0]])
REFERENCES = np.asarray([[-24.0, -30.0, 0.0], [-11.0, -13.0, -41.0]])
LENGTHS = np.asarray([[7, 9, 0], [4, 3, 11]])
IMITATED = np.asarray([[1, 0, 0], [1, 0, 1]])
STRENGTHS = np.asarray([2.0, 3.0])
# log(policy / reference) of the chosen less that of the rejected, by hand.
RATIOS = np.asarray([4.0 + 1.0, -1.0 - 6.0])


def targets(strengths=STRENGTHS) -> PolicyTargets:
    arrays: Any = [
        np.zeros((2, 5), bool),
        *(x.astype(np.float32) for x in (LENGTHS, IMITATED, REFERENCES)),
    ]
    slots = np.zeros((2, 1), np.int32)
    pairs: Any = [slots, slots + 1, np.ones((2, 1), np.float32), strengths[:, None]]
    pairs[3] = pairs[3].astype(np.float32)
    return PolicyTargets(Responses._make(arrays), Pairs._make(pairs))


def loss_of(text: str, there=None, **settings) -> float:
    objective = make_policy_objective(text, PreferenceConfig(beta=BETA, **settings))
    there = there or targets()
    scores: Any = SCORES[..., None].astype(np.float32)
    return float(objective.loss(scores, there, objective.weights(there)))


def minus_log_sigmoid(x):
    return np.log1p(np.exp(-x))


def test_sft_is_the_mean_over_the_tokens_of_what_is_imitated():
    assert loss_of("sft") == pytest.approx((20 + 12 + 40) / (7 + 4 + 11))


def test_dpo_by_hand():
    plain = minus_log_sigmoid(BETA * RATIOS)
    assert loss_of("dpo") == pytest.approx(plain.mean(), rel=1e-5)
    opposite = minus_log_sigmoid(-BETA * RATIOS)
    smoothed = 0.9 * plain + 0.1 * opposite  # conservative DPO
    assert loss_of("dpo", label_smoothing=0.1) == pytest.approx(smoothed.mean(), rel=1e-5)
    scaled = STRENGTHS * plain
    assert loss_of("scaled_dpo") == pytest.approx(scaled.mean(), rel=1e-5)
    margin = minus_log_sigmoid(BETA * RATIOS - STRENGTHS)
    assert loss_of("margin_dpo") == pytest.approx(margin.mean(), rel=1e-5)


def test_ipo_by_hand():
    plain = (RATIOS - 5) ** 2  # 1 / (2 beta) = 5
    assert loss_of("ipo") == pytest.approx(plain.mean(), rel=1e-5)
    smoothed = 0.9 * plain + 0.1 * (RATIOS + 5) ** 2
    assert loss_of("ipo", label_smoothing=0.1) == pytest.approx(smoothed.mean(), rel=1e-5)


def test_rpo_by_hand():
    """Two preferences, the strength's a and the policy's b, as squares and as divergences."""
    wanted, found = 0.5 * STRENGTHS, BETA * RATIOS
    square = (found - wanted) ** 2
    assert loss_of("rpo_sq", strength_scale=0.5) == pytest.approx(square.mean(), rel=1e-5)
    opposite = (-found - wanted) ** 2
    smoothed = (0.9 * square + 0.1 * opposite).mean()
    assert loss_of("rpo_sq", strength_scale=0.5, label_smoothing=0.1) == pytest.approx(smoothed)
    a, b = (1 / (1 + np.exp(-x)) for x in (wanted, found))
    for name, p, q in (("rpo_bwd_kl", a, b), ("rpo_fwd_kl", b, a)):
        divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        assert loss_of(name, strength_scale=0.5) == pytest.approx(divergence.mean(), rel=1e-5)
    tie = targets(np.asarray([2.0, 0.0]))
    square = [(found[0] - 2) ** 2, found[1] ** 2]
    assert loss_of("rpo_sq", tie, ties="half") == pytest.approx(np.mean(square), rel=1e-5)


@pytest.mark.parametrize("name", ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"])
def test_rpo_is_finite_and_flat_where_the_margin_is_the_strengths(name):
    config = PreferenceConfig(beta=1.0)
    objective = make_policy_objective(name, config)
    strengths = np.asarray([200.0, 5.0])
    there = targets(strengths)

    def loss(scores):
        return objective.loss(scores, there, objective.weights(there))

    scores = REFERENCES.copy()
    scores[:, 0] += strengths
    value, gradient = jax.value_and_grad(loss)(scores[..., None].astype(np.float32))
    assert value == pytest.approx(0, abs=1e-6) and np.abs(gradient).max() < 1e-5
    far = jax.grad(loss)(-scores[..., None].astype(np.float32))
    assert np.isfinite(far).all()


def test_simpo_by_hand():
    """The mean log-probability of a token decides, and nobody is a reference."""
    means = SCORES / np.maximum(LENGTHS, 1)
    margins = 2.0 * (means[:, 0] - means[:, 1])
    config = PreferenceConfig(beta=2.0, gamma=0.3)
    objective = make_policy_objective("simpo", config)
    assert not objective.reference and objective.pairs
    there, scores = targets(), SCORES[..., None].astype(np.float32)

    def loss(scores, there, objective=objective):
        return float(objective.loss(scores, there, objective.weights(there)))

    plain = minus_log_sigmoid(margins - 0.3)
    assert loss(scores, there) == pytest.approx(plain.mean(), rel=1e-5)
    other = there._replace(responses=there.responses._replace(reference=0 * LENGTHS))
    assert loss(scores, other) == loss(scores, there)
    smoothed = 0.9 * plain + 0.1 * minus_log_sigmoid(0.3 - margins)  # as TRL's CPOTrainer
    config = dataclasses.replace(config, label_smoothing=0.1)
    found = loss(scores, there, make_policy_objective("simpo", config))
    assert found == pytest.approx(smoothed.mean(), rel=1e-5)
    config = PreferenceConfig(beta=2.0, gamma=0.3, ties="half")
    half = (minus_log_sigmoid(margins[1]) + minus_log_sigmoid(-margins[1])) / 2
    tie = targets(np.asarray([2.0, 0.0]))
    found = loss(scores, tie, make_policy_objective("simpo", config))
    assert found == pytest.approx((plain[0] + half) / 2, rel=1e-5)


def test_which_objectives_need_a_reference():
    def needs(text):
        return make_policy_objective(text, PreferenceConfig()).reference

    assert [needs(text) for text in ("sft", "simpo", "simpo + sft", "dpo", "rpo_sq + sft")] == [
        *[False] * 3,
        *[True] * 2,
    ]


def test_ties_count_as_they_do_for_rewards():
    tie = targets(np.asarray([2.0, 0.0]))
    first = minus_log_sigmoid(BETA * RATIOS[0])
    half = 0.5 * (minus_log_sigmoid(BETA * RATIOS[1]) + minus_log_sigmoid(-BETA * RATIOS[1]))
    assert loss_of("dpo", tie, ties="half") == pytest.approx((first + half) / 2, rel=1e-5)
    assert loss_of("dpo", tie, ties="zero_weight") == pytest.approx(first, rel=1e-5)


def test_a_sum_imitates_the_chosen():
    both = loss_of("dpo + 0.2 * sft")
    assert both == pytest.approx(loss_of("dpo") + 0.2 * loss_of("sft"), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "beta", "settings", "said"),
    [
        ("bradley_terry", 0.1, {}, "there are sft, dpo"),
        ("dpo", 0.0, {}, "beta = 0.0: expected a positive number"),
        ("sft", 0.1, dict(center_rewards_coefficient=0.1), "neither columns nor rewards"),
        ("sft", 0.1, dict(attribute="helpfulness"), "neither columns nor rewards"),
    ],
)
def test_settings_that_mean_nothing_are_errors(text, beta, settings, said):
    with pytest.raises(UserError, match=said):
        make_policy_objective(text, PreferenceConfig(beta=beta, **settings))


def test_of_a_pair_the_chosen_response_is_imitated_and_of_a_tie_none(rng):
    data = pairs_of_responses(rng, 3)
    strengths = np.where(np.arange(6) == 2, 0, data.strengths).astype(np.float32)
    data = dataclasses.replace(data, strengths=strengths)
    batches = training_batches(data, [np.arange(6)], row_shape(data, rows=1, length=128))
    samples, there = batches[0].samples, batches[0].targets
    assert isinstance(there, PolicyTargets)
    responses = there.responses
    order = samples[samples >= 0]
    np.testing.assert_array_equal(np.isin(order, [0, 4]), responses.imitated[samples >= 0])
    lengths = [data.spoken_in(i).sum() for i in order]
    np.testing.assert_array_equal(responses.lengths[samples >= 0], lengths)
    assert not responses.lengths[samples < 0].any()
    assert responses.predicting.sum() == sum(lengths)


# ---- steps --------------------------------------------------------------------------------------


def pairs_of_responses(rng, count: int, reference=()) -> TokenizedData:
    """Prompts with two responses each, which begin alike, the first one chosen."""
    tokens, spoken, prompts = [], [], []
    for number in range(count):
        prompt = rng.integers(1, 262, rng.integers(4, 16))
        for _ in range(2):
            own = np.concatenate([[7], rng.integers(1, 262, rng.integers(1, 12))])
            tokens.append(np.concatenate([prompt, own]).astype(np.int32))
            spoken.append(np.arange(len(tokens[-1])) >= len(prompt))
            prompts.append(str(number))
    data, _ = in_memory(tokens, prompts, spoken)
    chosen = np.arange(len(data)) % 2 == 0
    strengths = np.where(chosen, rng.integers(1, 4, len(data)), np.nan).astype(np.float32)
    data = dataclasses.replace(data, chosen=chosen, strengths=strengths)
    if len(reference):
        labels = np.asarray(reference, np.float32)[:, None]
        data = dataclasses.replace(data, attributes=(REFERENCE,), labels=labels)
    return data


def policy(sharding: Sharding | None = None) -> Model:
    decoder = tiny_llama(num_hidden_layers=2, vocab_size=264, tie_word_embeddings=True)
    return Model(decoder, ModelOptions(sharding or one_device()), LanguageModelHead(tied=True))


def scores_by_sample(model: Model, params, data: TokenizedData) -> np.ndarray:
    """The log-probability of each response, one a row."""
    data = dataclasses.replace(data, chosen=np.zeros(len(data), bool))  # no pairs to keep together
    shape = RowShape(len(data), 32, 1)
    batches = training_batches(data, [np.arange(len(data))], shape, packing=False, share=False)
    micro = jax.tree.map(lambda x: x[0], batches[0]._replace(microbatches=None))
    found = jax.jit(lambda params: scores_of(model, params, micro))(params)
    scores = np.zeros(len(data))
    scores[micro.samples[:, 0]] = found[:, 0, 0]
    return scores


def losses(
    data: TokenizedData, objective: Objective, rows: int, mesh: MeshConfig | None = None, steps=3
) -> list[float]:
    """Of some steps, each over all of the data."""
    sharding = Sharding(make_mesh(mesh)) if mesh else one_device()
    model = policy(sharding)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
    program = make_program(model, objective, config, steps=steps, trainable=(".*",))
    shape = row_shape(data, rows=rows, length=64)
    batches = training_batches(data, [np.arange(len(data))] * steps, shape)
    state, found = program.start(random_params(model, seed=1)), []
    for batch in iterate(batches, 0, sharding):
        state, metrics = program.step(state, batch)
        found.append(float(metrics.loss))
    return found


@pytest.mark.slow
def test_steps_lower_the_loss_and_do_not_depend_on_rows_or_mesh(rng):
    """The first loss is numpy's from each response's log-probability by itself."""
    data = pairs_of_responses(rng, 8)
    model = policy()
    params = random_params(model, seed=1)
    scores = scores_by_sample(model, params, data)
    reference = scores + rng.normal(0, 3, len(scores))
    data = dataclasses.replace(
        data, attributes=(REFERENCE,), labels=reference[:, None].astype(np.float32)
    )
    objective = make_policy_objective("dpo + 0.2 * sft", PreferenceConfig(beta=BETA))
    found = losses(data, objective, rows=8)

    ratios = (scores - reference).reshape(-1, 2)
    dpo = minus_log_sigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    sft = -scores[::2].sum() / sum(data.spoken_in(i).sum() for i in range(0, len(data), 2))
    assert found[0] == pytest.approx(dpo + 0.2 * sft, rel=1e-5)
    assert found[2] < found[1] < found[0]

    in_parts = losses(data, objective, rows=1)
    np.testing.assert_allclose(in_parts, found, rtol=1e-5)
    on_eight = losses(data, objective, rows=4, mesh=MeshConfig(fsdp=2, context=2, tensor=2))
    np.testing.assert_allclose(on_eight, found, rtol=1e-5)


@pytest.mark.slow
def test_a_policy_that_is_its_own_reference_has_no_margin(rng):
    """So its loss is log 2, whatever rows it was computed in."""
    data = pairs_of_responses(rng, 4)
    model = policy()
    scores = scores_by_sample(model, random_params(model, seed=1), data)
    data = dataclasses.replace(
        data, attributes=(REFERENCE,), labels=scores[:, None].astype(np.float32)
    )
    objective = make_policy_objective("dpo", PreferenceConfig(beta=BETA))
    (found,) = losses(data, objective, rows=2, steps=1)
    assert found == pytest.approx(np.log(2), abs=1e-5)
