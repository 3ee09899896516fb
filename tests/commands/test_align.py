"""Policies that learn from their own samples: the loop, what a kill leaves, what is refused."""

import json
from typing import Any

import numpy as np
import pytest

import rmjax.align
from helpers.hf_models import NAMES, save_hf
from helpers.models import tiny_llama
from helpers.runs import assert_same_bits, metrics, on_one_device
from rmjax.align import align
from rmjax.config import (
    AlignConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
)
from rmjax.errors import UserError
from rmjax.report import report_run
from rmjax.runtime.sharding import MeshConfig, make_mesh
from rmjax.train import train
from rmjax.training.validate_config import validate

FUNCTION = """
import pathlib

def plain(prompts, responses):
    return [sum(letter.isascii() for letter in r) / (1 + len(r)) for r in responses]

def nothing(prompts, responses):
    return [0.0 for _ in responses]

def absent(prompts, responses):
    if pathlib.Path(__file__).with_name("away").exists():
        raise ConnectionError("nobody is there")
    return plain(prompts, responses)

def broken(prompts, responses):
    raise RuntimeError("the judge is ill")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A language model, a reward model, prompts, and functions."""
    directory = tmp_path_factory.mktemp("align")
    llama = tiny_llama(num_hidden_layers=2, max_position_embeddings=64)
    save_hf(directory / "policy", llama, causal=True)
    save_hf(directory / "reward", llama, names=NAMES[:2], seed=1)
    (directory / "function.py").write_text(FUNCTION)
    prompts = [{"prompt": f"say {word}"} for word in ("a", "b", "a", "cc", "dd", "e" * 60, "f")]
    for name, rows in (("train", prompts), ("held", [{"prompt": "x"}, {"prompt": "y"}])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def config_of(files, workdir, by="plain", **changes) -> AlignConfig:
    by_model = by == "model"
    fields: dict[str, Any] = dict(
        workdir=str(workdir),
        data=DataConfig(
            train=str(files / "train.jsonl"),
            validation=str(files / "held.jsonl"),
            attributes=(),
            max_length=48,
            row_length=64,
        ),
        init=str(files / "policy"),
        rollout=RolloutConfig(n=4, max_tokens=12, rows=8),
        rewards={
            "teacher": RewardConfig(
                model=str(files / "reward") if by_model else "",
                value=NAMES[1] if by_model else "",
                function="" if by_model else f"{files / 'function.py'}:{by}",
            )
        },
        batch_size=8,
        steps=4,
        rows_per_device=2,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=1),
        eval_every=4,
        checkpoint_every=2,
        seed=3,
    )
    return AlignConfig(**(fields | changes))


def run(config, **patches):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"make_mesh": on_one_device} | patches).items():
            patch.setattr(rmjax.align, name, value)
        align(config)


def numbers(workdir):
    clock = ("tokens_per_second", "seconds_sampling", "seconds_scoring", "seconds_updating")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics(workdir)]


def rollout(workdir, step):
    path = workdir / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["reinforce", "rloo", "grpo"])
def test_the_reward_rises(method, files, tmp_path, capsys):
    # Such steps go far from the reference, which the methods' own coefficients would hold against.
    gradient = PolicyGradientConfig(kl=0.0, minibatches=2 if method == "grpo" else 1)
    run(config_of(files, tmp_path / "run", objective=method, steps=12, policy_gradient=gradient))
    found = [line for line in metrics(tmp_path / "run") if "reward" in line]
    assert len(found) == 12
    assert np.mean([x["reward"] for x in found[-3:]]) > found[0]["reward"] + 0.1
    held = [
        line["held_out/reward"] for line in metrics(tmp_path / "run") if "held_out/reward" in line
    ]
    assert held[-1] > held[0] + 0.1
    # The policy that sampled is the one that is trained: what both say of a token is the same.
    assert max(x["sampler_gap_largest"] for x in found) < 1e-4
    assert found[0]["kl"] == 0 and found[-1]["kl"] > 0
    said = capsys.readouterr().out
    assert (
        "7 read, 1 dropped: an earlier row has the prompt, 1 dropped: more than 36 tokens" in said
    )
    rows = rollout(tmp_path / "run", 1)
    assert len(rows) == 2 and all(len(row["responses"]) == 4 for row in rows)
    expected = [[sum(c.isascii() for c in r) / (1 + len(r)) for r in x["responses"]] for x in rows]
    np.testing.assert_allclose([row["scores"] for row in rows], expected)
    policy = rmjax.load_policy(tmp_path / "run")
    assert policy.sample(["say a"], max_tokens=4)[0][0].text is not None
    _, written = report_run(str(tmp_path / "run"), str(tmp_path / "report"))
    assert "A run of rmjax.align" in written[0].read_text()


def test_two_steps_a_kill_and_two_more_are_four(files, tmp_path):
    """A step whose samples were written is repeated with these, to the last bit."""
    run(config_of(files, tmp_path / "whole", "model"))
    killed = config_of(files, tmp_path / "killed", "model")
    learned_data, calls = rmjax.align.learned_data, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:  # the samples of step 4 are there, and step 3 was not saved
            raise KeyboardInterrupt
        return learned_data(*args)

    with pytest.raises(KeyboardInterrupt):
        run(killed, learned_data=dies)
    before = {path.name: path.read_bytes() for path in (tmp_path / "killed/rollouts").iterdir()}
    assert len(before) == 4

    def no_more(*args, **_):
        raise AssertionError("samples that are there are made again")

    run(killed, make_rollout=no_more)
    after = {path.name: path.read_bytes() for path in (tmp_path / "killed/rollouts").iterdir()}
    assert before == after
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "killed")
    policies = [rmjax.load_policy(tmp_path / name) for name in ("whole", "killed")]
    assert_same_bits(*(policy.params for policy in policies))
    row = rollout(tmp_path / "whole", 1)[0]
    scorer = rmjax.load(files / "reward", value=NAMES[1])
    for text, reward in zip(row["responses"], row["scores"]):
        answer = {"role": "assistant", "content": text}
        if text:
            assert reward == pytest.approx(scorer.score([*row["prompt"], answer]).value, abs=1e-5)


def test_a_reward_that_goes_away_loses_no_samples(files, tmp_path):
    """Samples are written before they are rewarded, and then they are only rewarded."""
    rated = tmp_path / "rated.jsonl"
    answers = [{"prompt": "q", "response": text} for text in ("a", "é", "bé", "")]
    rated.write_text("".join(json.dumps(row) + "\n" for row in answers))
    rewards = {
        "plain": RewardConfig(function=f"{files / 'function.py'}:absent", standardize=str(rated)),
        "teacher": RewardConfig(str(files / "reward"), value=NAMES[1], weight=0.5),
    }
    config = config_of(files, tmp_path / "run", steps=2, eval_every=2, rewards=rewards)
    make_rollout = rmjax.align.make_rollout

    def goes_away(*args):
        made = make_rollout(*args)
        if args[-1] == 2:
            (files / "away").touch()
        return made

    with pytest.raises(UserError, match=r"nobody is there .* kept in .*step-000002\.jsonl; run"):
        run(config, make_rollout=goes_away)
    (files / "away").unlink()
    sampled = rollout(tmp_path / "run", 2)
    assert not any("scores" in row for row in sampled)
    made = []
    run(config, make_rollout=lambda *args: made.append(args[-1]))  # step 1 was not saved
    assert not made
    rows = rollout(tmp_path / "run", 2)
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in sampled]
    found = next(line for line in metrics(tmp_path / "run") if line["step"] == 2)
    given = np.asarray([1 / 2, 0, 1 / 3, 0])  # of the file's responses, by hand
    for row in rows:
        for text, score, single in zip(row["responses"], row["scores"], row["attributes"]):
            plain = sum(c.isascii() for c in text) / (1 + len(text))
            assert single["plain"] == pytest.approx(plain)
            if score is not None:
                assert single["teacher"] == single[f"teacher/{NAMES[1]}"]
                expected = (plain - given.mean()) / given.std() + 0.5 * single["teacher"]
                assert score == pytest.approx(expected)
    singles = [single for row in rows for single in row["attributes"]]
    assert found["reward/plain"] == pytest.approx(np.mean([x["plain"] for x in singles]))
    names = {name for line in metrics(tmp_path / "run") for name in line}
    assert {"held_out/reward/plain", f"held_out/reward/teacher/{NAMES[0]}"} <= names


def test_a_mesh_changes_nothing(files, tmp_path):
    run(config_of(files, tmp_path / "one", steps=2, eval_every=0))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    run(config_of(files, tmp_path / "eight", steps=2, eval_every=0, mesh=mesh, rows_per_device=1),
        make_mesh=make_mesh)  # fmt: skip
    for step in (1, 2):
        ours, theirs = (rollout(tmp_path / name, step) for name in ("one", "eight"))
        assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in theirs]
    one, eight = ([x for x in numbers(tmp_path / n) if "loss" in x][-1] for n in ("one", "eight"))
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(eight[name], rel=1e-4, abs=1e-5)


def test_equal_rewards_teach_nothing_and_are_counted(files, tmp_path):
    run(config_of(files, tmp_path / "run", "nothing", objective="grpo", steps=1))
    found = metrics(tmp_path / "run")[1]
    assert found["without_advantage"] == 2 and found["loss"] == 0 and found["grad_norm"] == 0


def test_what_goes_wrong_is_named(files, tmp_path):
    with pytest.raises(UserError, match="raised RuntimeError: the judge is ill"):
        run(config_of(files, tmp_path / "run", "broken"))
    with pytest.raises(UserError, match="an AlignConfig is a run of"):
        train(config_of(files, tmp_path / "x"))
    with pytest.raises(UserError, match=r"this config is for `python -m rmjax\.train`"):
        align(Config("w", DataConfig("x"), OptimizerConfig(1e-3), 8))
    with pytest.raises(UserError, match=r"another config:\n  rollout\.rows: was 8, now 64\n.*temp"):
        run(config_of(files, tmp_path / "run", "broken", rollout=RolloutConfig(4, 0.5, 1.0, 0, 12)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rewards={}), "config.rewards is empty: give at least one"),
        (dict(rewards={"a": RewardConfig()}), "rewards.a: of model, function and server .* none"),
        (dict(rewards={"a": RewardConfig("m", "f")}), "give one; found model and function"),
        (dict(rewards={"a b": RewardConfig("m")}), "config.rewards has 'a b': expected a name"),
        (dict(rewards={"items": RewardConfig("m")}), "config.rewards has 'items'"),
        (dict(rewards={"a": RewardConfig("m", weight=0.0)}), "every weight is 0"),
        (
            dict(rewards={"a": RewardConfig("m", weight=True)}),
            "a.weight = True: expected float",
        ),
        (dict(rewards={"a": RewardConfig("m", timeout=0.0)}), "rewards.a.timeout = 0.0: exp"),
        (dict(rewards={"a": RewardConfig(server="u", value="x")}), "which of its numbers, from 0"),
        (dict(rollout=RolloutConfig(n=1)), "config.rollout.n = 1: .* 2 or more"),
        (dict(batch_size=6), "config.batch_size = 6 responses of rollout.n = 4"),
        (dict(rollout=RolloutConfig(n=4, max_tokens=48)), "leaves no room for a prompt"),
        (dict(policy_gradient=PolicyGradientConfig(kl=-1.0)), "policy_gradient.kl = -1.0"),
        (dict(objective="ppo"), "of a policy's own samples there are reinforce"),
    ],
)
def test_settings_that_do_not_fit(changes, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        validate(config_of(files, tmp_path, **changes))
