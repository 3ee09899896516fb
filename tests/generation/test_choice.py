"""Drawn tokens against transformers' warpers and against the probabilities themselves."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rmjax.generation.choice import choose, make_rule, uniform

DRAWS = 4096


def draw(logits: np.ndarray, count: int, seed: int = 0, **settings) -> np.ndarray:
    """So many draws from the logits of one place."""
    rule = make_rule(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings))
    keys = np.stack([np.full(count, seed), np.arange(count)], 1).astype(np.uint32)
    noise = uniform(jnp.asarray(keys), jnp.zeros(count, jnp.int32))
    return np.asarray(choose(jnp.asarray(np.tile(logits, (count, 1))), noise, rule)[0])


def theirs(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The probabilities that transformers draws with."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    ids: Any = torch.zeros((1, 1), dtype=torch.long)
    warped = warpers(ids, torch.tensor(logits)[None])
    return torch.softmax(warped.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0, top_p=1.0, top_k=0),
        dict(temperature=0.5, top_p=1.0, top_k=0),
        dict(temperature=1.0, top_p=0.8, top_k=0),
        dict(temperature=1.5, top_p=1.0, top_k=7),
        dict(temperature=0.7, top_p=0.9, top_k=12),
        dict(temperature=1.0, top_p=1e-6, top_k=0),
        dict(temperature=1.0, top_p=1.0, top_k=1),
    ],
    ids=str,
)
def test_draws_have_transformers_probabilities(settings, rng):
    """None outside of what is left, all inside, as often as a chi-squared test allows."""
    # Likely tokens at both ends of the vocabulary, whose last block is not full.
    logits = np.full(600, -12.0, np.float32)
    likely = rng.choice(600, 30, replace=False)
    logits[likely] = 2 * rng.standard_normal(30)
    expected = theirs(logits, **settings)
    counts = np.bincount(draw(logits, DRAWS, **settings), minlength=600)
    assert not counts[expected == 0].any()
    often = expected * DRAWS >= 5
    found = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * DRAWS
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    if len(found) > 1:
        assert stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-3


def test_greedy_takes_the_largest(rng):
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    rule = make_rule(0.0, 0.5, 3)
    token, log_probability = choose(jnp.asarray(logits), (jnp.zeros(5), jnp.zeros(5)), rule)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    expected = torch.log_softmax(torch.tensor(logits), -1).max(-1).values
    np.testing.assert_allclose(log_probability, expected, atol=1e-6)


def test_log_probabilities_are_the_models_whatever_the_rule(rng):
    logits = 3 * rng.standard_normal((50, 300)).astype(np.float32)
    rule = make_rule(0.3, 0.5, 20)
    keys = np.arange(100, dtype=np.uint32).reshape(50, 2)
    noise = uniform(jnp.asarray(keys), jnp.zeros(50, jnp.int32))
    token, found = choose(jnp.asarray(logits), noise, rule)
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(found, expected[np.arange(50), np.asarray(token)], atol=1e-5)


def test_tokens_as_probable_as_the_last_are_left_too():
    logits = np.full(300, -20.0, np.float32)
    logits[[3, 100, 290]] = 1.0
    assert set(draw(logits, 200, top_k=2).tolist()) == {3, 100, 290}
    assert set(draw(logits, 200, top_p=0.4).tolist()) == {3, 100, 290}


@pytest.mark.parametrize("noise", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_a_token_without_probability_is_never_drawn(noise):
    """At the very ends of the noise, with zeros at both ends of the vocabulary."""
    logits = np.full((1, 513), -np.inf, np.float32)
    logits[0, 200:400] = np.linspace(-5, 5, 200)
    number = jnp.full(1, noise, jnp.float32)
    numbers = (number, number)
    token, _ = choose(jnp.asarray(logits), numbers, make_rule(1.0, 1.0, 0))
    assert 200 <= int(token[0]) < 400


def test_noise_depends_on_key_and_position_alone():
    keys = np.asarray([[1, 2], [3, 4], [1, 2]], np.uint32)
    first, second = uniform(jnp.asarray(keys), jnp.asarray([5, 5, 6], jnp.int32))
    assert len({*np.asarray(first).tolist(), *np.asarray(second).tolist()}) == 6
    alone, _ = uniform(jnp.asarray(keys[1:2]), jnp.asarray([5], jnp.int32))
    assert alone[0] == first[1]
