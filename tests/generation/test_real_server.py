"""A server of others as an engine, against the same weights in this process.

It must be running: none starts in the time that a test has. docs/sample.md says how to start one.
"""

import os

import numpy as np
import pytest

from rmjax.generation.policy import load_policy
from rmjax.generation.server import open_server

PROMPTS = [
    "What is the capital of France?",
    "Name three colours.",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
    "Give me a word that rhymes with cat.",
    "Is water wet? Answer briefly.",
    "Translate 'good morning' to Spanish, and write it with an emoji: 🙂.",
    "What day comes after Monday?",
]


@pytest.fixture(scope="module")
def named():
    url, model = (os.environ.get(name) for name in ("RMJAX_TEST_SERVER", "RMJAX_TEST_SERVED"))
    if not url or not model:
        pytest.skip(
            "no server: set RMJAX_TEST_SERVER to its URL, and RMJAX_TEST_SERVED to the directory "
            "or GGUF file of the Llama that it serves in float32"
        )
    return url, model


@pytest.fixture(scope="module")
def engine(named):
    url, model = named
    return open_server(url, tokenizer=model, timeout=120, retries=1, concurrency=4)


@pytest.fixture(scope="module")
def policy(named):
    return load_policy(named[1], dtype="float32")


def test_greedy_samples_are_ours(engine, policy):
    """Equal until two tokens are about as probable; what is common has our log-probabilities."""
    settings = dict(temperature=0.0, max_tokens=24)
    ours, theirs = policy.sample(PROMPTS, **settings), engine.sample(PROMPTS, **settings)
    for [one], [other] in zip(ours, theirs):
        pairs = zip(one.tokens.tolist(), other.tokens.tolist())
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if common is None:
            assert (one.text, one.reason) == (other.text, other.reason)
        else:  # theirs was chosen over ours by rounding alone
            gap = one.log_probabilities[common] - other.log_probabilities[common]
            assert abs(gap) < 1e-4
        if not np.isnan(other.log_probabilities).any():
            first, second = one.log_probabilities[:common], other.log_probabilities[:common]
            np.testing.assert_allclose(first, second, atol=1e-4)


def test_ends(engine):
    [[cut]] = engine.sample(PROMPTS[:1], temperature=0.0, max_tokens=3)
    assert cut.reason == "length" and len(cut.tokens) == 3
    [[stopped]] = engine.sample(PROMPTS[:1], temperature=0.0, stop=["France"])
    assert (stopped.reason, stopped.stop) == ("stop", "France") and "France" not in stopped.text
    [[whole]] = engine.sample(PROMPTS[:1], temperature=0.0)
    assert whole.reason == "end" and whole.tokens[-1] in engine.end_tokens


def test_seeds(engine):
    settings = dict(n=3, temperature=1.0, max_tokens=12)
    first = engine.sample(PROMPTS[:3], seed=1, **settings)
    again = engine.sample(PROMPTS[:3], seed=1, **settings)
    other = engine.sample(PROMPTS[:3], seed=2, **settings)
    texts = [
        [[one.text for one in samples] for samples in found] for found in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len({one.text for one in first[0]}) > 1


def test_one_token_left_is_greedy(engine):
    settings = dict(max_tokens=12)
    greedy = engine.sample(PROMPTS[:3], temperature=0.0, **settings)
    left = engine.sample(PROMPTS[:3], temperature=1.0, top_k=1, **settings)
    assert [[one.text] for [one] in greedy] == [[one.text] for [one] in left]
