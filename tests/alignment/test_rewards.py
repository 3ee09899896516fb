"""What samples are worth: several rewards as one, in deviations from a mean, and by functions."""

import json

import numpy as np
import pytest

from rmjax.alignment.reward_functions import FunctionReward
from rmjax.alignment.rewards import Rewards, open_rewards
from rmjax.config import RewardConfig
from rmjax.data.conversation import Conversation
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.runtime.sharding import MeshConfig

PROMPTS = [Conversation([{"role": "user", "content": word}]) for word in ("a", "b")]
FUNCTIONS = """
from __future__ import annotations
import asyncio, dataclasses, sys, time
import jax.numpy as jnp
import numpy as np

@dataclasses.dataclass
class Judge:  # needs its module to be known
    best: int

def length(prompts, responses):
    assert prompts[0][-1]["content"] == "a"
    prompts[0].append("it is mine")
    assert len(prompts[1]) == 1
    print("a judge may print")
    return [None if r == "x" else -len(r) for r in responses]

async def later(prompts, responses):
    await asyncio.sleep(0)
    return np.arange(len(responses), dtype=np.float32)

def kinds(prompts, responses):
    yield from (True, np.int64(2), jnp.asarray(3.0), 4)

def raises(prompts, responses):
    raise ValueError("no\\nway")

def leaves(prompts, responses):
    sys.exit(3)

def few(prompts, responses):
    return [1.0]

def endless(prompts, responses):
    while True:
        yield 1.0

def odd(prompts, responses):
    return [float("nan")] * len(responses)

def words(prompts, responses):
    return ["good"] * len(responses)

def one(prompts, responses):
    return 1.0

def named(prompts, responses):
    return {r: 1.0 for r in responses}

def unordered(prompts, responses):
    return {float(len(r)) for r in responses}

def hangs(prompts, responses):
    time.sleep(60)

number = 3
"""
TEXTS = [["x", "four"], ["", "three"]]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def by(file, name, timeout=30.0):
    return FunctionReward(f"{file}:{name}", timeout, "config.rewards.mine.function")


def test_what_a_function_may_give(file):
    for name, expected in (
        ("length", [[np.nan, -4], [0, -5]]),
        ("later", [[0, 1], [2, 3]]),
        ("kinds", [[1, 2], [3, 4]]),
    ):
        rewards, attributes = by(file, name)(PROMPTS, TEXTS)
        np.testing.assert_array_equal(rewards, expected)
        assert rewards.dtype == np.float64 and attributes is None
    assert [len(prompt.messages) for prompt in PROMPTS] == [1, 1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", r"mine\.py:raises raised ValueError: no way \(.*mine\.py line \d+\)"),
        ("leaves", "raised SystemExit: 3"),
        ("few", "1 rewards for 4 responses"),
        ("endless", "more than that for 4 responses"),
        ("odd", "a reward is nan, expected a number"),
        ("words", "a reward is 'good', expected a number"),
        ("one", "returns 1.0, expected a number or None for each response"),
        ("named", "returns {'x': 1.0, .*expected a number or None for each"),
        ("unordered", r"returns \{.*, expected a number or None for each"),
        ("hangs", "hangs, which rewards 4 responses, was not done after 0.1 s"),
    ],
)
def test_what_it_may_not_give(name, said, file):
    with pytest.raises(UserError, match=said):
        by(file, name, 0.1 if name == "hangs" else 30.0)(PROMPTS, TEXTS)


def test_functions_that_are_not_there(file, tmp_path):
    (tmp_path / "broken.py").write_text("import nowhere\n")
    (tmp_path / "text.txt").write_text("")
    for address, said in (
        (f"{file}:none", "mine.function: .* has no function 'none'"),
        (f"{file}:number", "has no function 'number'"),
        ("no.py:f", "there is no file 'no.py'"),
        (f"{tmp_path}/broken.py:f", "raised ModuleNotFoundError: .*broken.py line 1"),
        (f"{tmp_path}/text.txt:f", "is no Python file"),
    ):
        with pytest.raises(UserError, match=said):
            FunctionReward(address, 5.0, "config.rewards.mine.function")


def test_several_are_one_by_their_weights(file):
    configs = {
        "short": RewardConfig(function=f"{file}:length", weight=2.0),
        "place": RewardConfig(function=f"{file}:later", weight=-0.5),
        "judge": RewardConfig(function=f"{file}:length", weight=0.0),
    }
    rewards = open_rewards(configs, MeshConfig(), byte_tokenizer())
    total, attributes = rewards(PROMPTS, TEXTS)
    np.testing.assert_allclose(total, [[np.nan, 2 * -4 - 0.5], [-0.5 * 2, 2 * -5 - 0.5 * 3]])
    assert attributes[0] == [{"place": 0.0}, {"short": -4.0, "place": 1.0, "judge": -4.0}]
    assert list(rewards.said().values())[1] == f"{file}:later, weight -0.5"
    # A judge that only looks on may be silent.
    configs["short"] = RewardConfig(function=f"{file}:later", weight=0.5)
    total, _ = open_rewards(configs, MeshConfig(), byte_tokenizer())(PROMPTS, TEXTS)
    np.testing.assert_array_equal(total, np.zeros((2, 2)))


def test_attributes_of_a_model_have_its_name_before_them():
    def model(prompts, responses):
        return np.asarray([[1.0, np.nan]]), [[{"help": 3.0}, None]]

    def nothing(prompts, responses):
        return np.full((1, 1), np.nan), None

    rewards = Rewards({"teacher": RewardConfig("m")}, {"teacher": model})
    total, attributes = rewards(PROMPTS[:1], [["a", ""]])
    np.testing.assert_array_equal(total, [[1, np.nan]])
    assert attributes == [[{"teacher": 1.0, "teacher/help": 3.0}, None]]
    silent = Rewards({"t": RewardConfig("m")}, {"t": nothing})
    with pytest.raises(UserError, match="no response has a reward of each of t"):
        silent(PROMPTS[:1], [["a"]])


def test_standardized_by_the_rewards_of_given_data(tmp_path):
    """(r - mean) / deviation over the responses of a file, which a run keeps."""
    data = tmp_path / "rated.jsonl"
    texts = ["", "ab", "abcd", "abcdefgh"]
    data.write_text("".join(json.dumps({"prompt": "q", "response": t}) + "\n" for t in texts))
    asked = []

    def length(prompts, responses):
        asked.append([r for [r] in responses] if len(responses) > 2 else [])
        assert prompts[0].messages[-1]["role"] == "user"
        values = [[len(r) if r else np.nan for r in texts] for texts in responses]
        return np.asarray(values, np.float64), None

    def tenths(prompts, responses):
        return np.full((len(prompts), 1), 0.1), None

    def opened(**changes):
        config = RewardConfig("m", weight=3.0, standardize=str(data), **changes)
        made = Rewards({"t": config}, {"t": length})
        made.standardize(tmp_path)
        return made

    rewards, lengths = opened(), np.asarray([2.0, 4.0, 8.0])
    assert asked == [texts]
    total, attributes = rewards(PROMPTS, [["abc"], ["a"]])
    expected = 3 * (np.asarray([[3.0], [1.0]]) - lengths.mean()) / lengths.std()
    np.testing.assert_allclose(total, expected)
    assert attributes[0] == [{"t": 3.0}]  # as it was given
    assert "as of 3 responses of" in rewards.said()["t"] and "1 without" in rewards.said()["t"]
    data.write_text("")
    again, _ = opened()(PROMPTS, [["abc"], ["a"]])  # is not measured anew
    np.testing.assert_array_equal(again, total)
    (tmp_path / "rewards.json").write_text('{"t": {"mean": 1}}')
    with pytest.raises(UserError, match=r"rewards\.json: damaged"):
        opened()
    (tmp_path / "rewards.json").unlink()
    data.write_text(3 * (json.dumps({"prompt": "q", "response": "abc"}) + "\n"))
    said = r"t\.standardize = .*: 3 of its 3 resp.* do not diff"
    config = RewardConfig("m", standardize=str(data))
    with pytest.raises(UserError, match=said):  # of .1 three times numpy's deviation is 1e-17
        Rewards({"t": config}, {"t": tenths}).standardize(tmp_path)
