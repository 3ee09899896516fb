"""Policies that learn from their own samples: the loop, what a kill leaves, what is refused."""

import dataclasses
import gc
import json
import signal
import uuid
from typing import Any

import jax
import numpy as np
import pytest

import rmjax.align
from helpers.hf_models import NAMES, save_hf
from helpers.launching import run_all, started
from helpers.models import tiny_llama
from helpers.runs import assert_same_bits, metrics, on_one_device, steps_kept
from rmjax.align import align
from rmjax.alignment import experiment
from rmjax.alignment.updates import Learner
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import (
    AlignConfig,
    Config,
    CriticConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
    as_flat_dict,
)
from rmjax.errors import UserError
from rmjax.models.decoder_config import LoraConfig
from rmjax.report import report_run
from rmjax.runtime.sharding import MeshConfig, make_mesh
from rmjax.train import train
from rmjax.training.validate_config import check_continues, validate

FUNCTION = """
import os, pathlib, signal

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

def deadly(prompts, responses, calls=[]):
    calls.append(1)
    if len(calls) == int(os.environ.get("DIES", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(prompts, responses)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A language model, a reward model, prompts, and functions."""
    return made(tmp_path_factory.mktemp("align"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The same, of models that four devices of `tensor` divide."""
    return made(tmp_path_factory.mktemp("wide"), vocab_size=264, num_key_value_heads=4)


def made(directory, **changes):
    decoder = tiny_llama(num_hidden_layers=2, max_position_embeddings=64, **changes)
    save_hf(directory / "policy", decoder, causal=True)
    save_hf(directory / "reward", decoder, names=NAMES[:2], seed=1)
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


def run(config, make_mesh=on_one_device, **patches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", make_mesh)
        for name, value in patches.items():
            patch.setattr(rmjax.align, name, value)
        align(config)


def numbers(workdir):
    clock = ("tokens_per_second", "seconds_sampling", "seconds_scoring", "seconds_updating")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics(workdir)]


def rollout(workdir, step):
    path = workdir / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["reinforce", "grpo", "online_dpo"])
def test_the_reward_rises(method, files, tmp_path, capsys):
    # Such steps go far from the reference, which the methods' own coefficients would hold against.
    gradient = {
        "reinforce": PolicyGradientConfig(kl=0.0),
        "grpo": PolicyGradientConfig(minibatches=2),
        "online_dpo": PolicyGradientConfig(passes=2),
    }[method]
    run(config_of(files, tmp_path / "run", objective=method, steps=12, policy_gradient=gradient))
    found = [line for line in metrics(tmp_path / "run") if "reward" in line]
    assert len(found) == 12
    if method == "online_dpo":
        # Before its first update a policy is the reference; the second pass sees what that changed.
        assert found[0]["dpo_loss"] < np.log(2) - 0.01
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
    page = json.loads(written[2].read_text())
    assert [e["reward"]["mean"] for e in page["evaluations"]] == pytest.approx(held)
    gain = page["evaluations"][-1]["gain"]
    assert gain["prompts"] == 2 and gain["mean"] == pytest.approx(held[-1] - held[0])


def test_two_steps_a_kill_and_two_more_are_four(files, tmp_path):
    """A step whose samples were written is repeated with these, to the last bit; by PPO, whose
    critic has a state as well, and updates that see the samples twice."""
    method: Any = dict(
        objective="ppo",
        policy_gradient=PolicyGradientConfig(minibatches=2, passes=2),
        critic=CriticConfig(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1)),
    )
    run(config_of(files, tmp_path / "whole", "model", **method))
    killed = config_of(files, tmp_path / "killed", "model", **method)
    known, calls = Learner.known, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:  # the samples of step 4 are there, and step 3 was not saved
            raise KeyboardInterrupt
        return known(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "known", dies)
        run(killed)
    before = {path.name: path.read_bytes() for path in (tmp_path / "killed/rollouts").iterdir()}
    assert [*sorted(before)][1:] == [f"step-{step:06d}.jsonl" for step in (1, 2, 3, 4)]

    def no_more(*args, **_):
        raise AssertionError("samples that are there are made again")

    run(killed, make_rollout=no_more)
    after = {path.name: path.read_bytes() for path in (tmp_path / "killed/rollouts").iterdir()}
    assert before.items() <= after.items()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole/rollouts").iterdir()}
    assert whole == after and {"held-out-000000.jsonl", "held-out-000004.jsonl"} < whole.keys()
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "killed")
    policies = [rmjax.load_policy(tmp_path / name) for name in ("whole", "killed")]
    assert_same_bits(*(policy.params for policy in policies))
    steps = [x for x in metrics(tmp_path / "whole") if "critic_loss" in x]
    assert len(steps) == 4 and all(x["critic_grad_norm"] > 0 for x in steps)
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
        "teacher": RewardConfig(
            str(files / "reward"), value=json.dumps({NAMES[0]: -1, NAMES[1]: 2}), weight=0.5
        ),
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
                less, more = (single[f"teacher/{name}"] for name in NAMES[:2])
                assert single["teacher"] == pytest.approx(2 * more - less)
                expected = (plain - given.mean()) / given.std() + 0.5 * single["teacher"]
                assert score == pytest.approx(expected)
    singles = [single for row in rows for single in row["attributes"]]
    assert found["reward/plain"] == pytest.approx(np.mean([x["plain"] for x in singles]))
    names = {name for line in metrics(tmp_path / "run") for name in line}
    assert {"held_out/reward/plain", f"held_out/reward/teacher/{NAMES[0]}"} <= names


def test_ratings_that_answers_shall_have(files, tmp_path):
    """SteerLM 2.0, whose credits are worked out before each of a step's updates."""
    gradient = PolicyGradientConfig(minibatches=2, passes=2, ratings=f"{NAMES[1]}:1")
    data = dataclasses.replace(config_of(files, "x").data, validation="", label_range=(-1.0, 1.0))
    changes: Any = dict(objective="steerlm2", steps=1, policy_gradient=gradient, data=data)
    run(config_of(files, tmp_path / "run", "model", **changes))
    (found,) = metrics(tmp_path / "run")
    assert 1 <= found["steerlm_samples"] <= 4 and found["steerlm_divergence"] > 0
    assert found["grad_norm"] > 0 and found["step"] == 1


# GRPO learns from samples that ran out of room too; the rate keeps rounding what it is.
ON_MESHES: dict[str, Any] = dict(
    objective="grpo",
    policy_gradient=PolicyGradientConfig(kl=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
    steps=2,
    eval_every=0,
)


@pytest.fixture(scope="module")
def on_one(wide, tmp_path_factory):
    """Two steps on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(config_of(wide, workdir, "model", **ON_MESHES))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "sampling"),
    [
        (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=1, tensor=4)),
        (MeshConfig(fsdp=4, tensor=2), None),
        (MeshConfig(fsdp=2, tensor=4), MeshConfig(data=8, fsdp=1)),
        (MeshConfig(data=2, fsdp=2, context=2), None),
    ],
)
def test_a_mesh_changes_nothing(mesh, sampling, wide, on_one, tmp_path):
    rollouts = RolloutConfig(n=4, max_tokens=12, rows=8, mesh=sampling)
    changes = ON_MESHES | dict(mesh=mesh, rollout=rollouts, rows_per_device=1)
    run(config_of(wide, tmp_path / "run", "model", **changes), make_mesh=make_mesh)
    for step in (1, 2):
        ours, theirs = (rollout(workdir, step) for workdir in (on_one, tmp_path / "run"))
        assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in theirs]
    one, eight = (
        [line for line in numbers(workdir) if "loss" in line]
        for workdir in (on_one, tmp_path / "run")
    )
    for ours, theirs in zip(one, eight, strict=True):
        assert ours["grad_norm"] > 0.01
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "sampler_gap"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "held"), [(LoraConfig(), 4), (LoraConfig(rank=2), 1)])
def test_what_is_in_memory_while_it_learns(lora, held, files, tmp_path, capsys):
    """Policy, reference and two moments; with LoRA the frozen weights are the reference too."""
    decoder = open_pretrained(str(files / "policy")).decoder
    shape = (decoder.num_hidden_layers, decoder.intermediate_size, decoder.hidden_size)
    known, found = Learner.known, []

    def count() -> int:
        gc.collect()
        return sum(array.shape == shape for array in jax.live_arrays())

    def counted(*args):
        found.append(count() - before)
        return known(*args)

    optimizer = OptimizerConfig(learning_rate=3e-2, warmup_steps=1)
    changes: Any = dict(lora=lora, optimizer=optimizer, objective="grpo", eval_every=0)
    config = config_of(files, tmp_path / "run", steps=2, **changes)
    before = count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "known", counted)
        run(config)
        run(dataclasses.replace(config, steps=3))  # which continues it
    assert found == [held] * 3
    kl = [line["kl"] for line in metrics(tmp_path / "run") if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-5) and min(kl[1:]) > 1e-3
    said = capsys.readouterr().out
    assert ("reference" in said) == (not lora.rank)


@pytest.mark.parametrize(("method", "minibatches"), [("grpo", 1), ("online_dpo", 2)])
def test_equal_rewards_teach_nothing_and_are_counted(method, minibatches, files, tmp_path):
    gradient = PolicyGradientConfig(minibatches=minibatches)
    changes: Any = dict(objective=method, policy_gradient=gradient, steps=1)
    run(config_of(files, tmp_path / "run", "nothing", **changes))
    found = metrics(tmp_path / "run")[1]
    assert found["without_advantage"] == 2 and found["loss"] == 0 and found["grad_norm"] == 0


def test_what_goes_wrong_is_named(files, tmp_path):
    with pytest.raises(UserError, match="raised RuntimeError: the judge is ill"):
        run(config_of(files, tmp_path / "run", "broken"))
    teacher = {"teacher": RewardConfig(model=str(files / "policy"), value="log_probability")}
    with pytest.raises(UserError, match=r"config\.rewards\.teacher\.model: .*policy is a language"):
        run(config_of(files, tmp_path / "x", rewards=teacher))
    found = {"loss": 0.5, "grad_norm": 1.0, "critic_loss": np.nan}
    with pytest.raises(UserError, match=r"step 3: .*, critic_loss nan"):
        rmjax.align.check_finite(3, found, files / "step-000003.jsonl")
    with pytest.raises(UserError, match="an AlignConfig is a run of"):
        train(config_of(files, tmp_path / "x"))
    with pytest.raises(UserError, match=r"this config is for `python -m rmjax\.train`"):
        align(Config("w", DataConfig("x"), OptimizerConfig(1e-3), 8))
    with pytest.raises(UserError, match=r"another config:\n  rollout\.rows: was 8, now 64\n.*temp"):
        run(config_of(files, tmp_path / "run", "broken", rollout=RolloutConfig(4, 0.5, 1.0, 0, 12)))


def test_a_run_may_go_on_with_another_mesh_to_sample_on(files, tmp_path):
    before = as_flat_dict(config_of(files, tmp_path))
    rollouts = RolloutConfig(n=4, max_tokens=12, rows=8, mesh=MeshConfig(data=2, tensor=4))
    now = config_of(files, tmp_path, rollout=rollouts)
    check_continues(before, now)
    check_continues(as_flat_dict(now), config_of(files, tmp_path))
    rollouts.temperature = 0.5
    with pytest.raises(UserError, match=r"temperature: was 1\.0, now 0\.5"):
        check_continues(before, now)


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
        (
            dict(objective="ppo", rollout=RolloutConfig(n=0)),
            r"config\.rollout\.n = 0: expected from 1",
        ),
        (dict(rollout=RolloutConfig(temperature=-1.0)), "config.rollout.temperature = -1.0: exp"),
        (dict(rollout=RolloutConfig(rows=0)), "config.rollout.rows = 0: expected 1 or more"),
        (dict(batch_size=6), "config.batch_size = 6 responses of rollout.n = 4"),
        (dict(rollout=RolloutConfig(n=4, max_tokens=48)), "leaves no room for a prompt"),
        (dict(policy_gradient=PolicyGradientConfig(kl=-1.0)), "policy_gradient.kl = -1.0"),
        (dict(policy_gradient=PolicyGradientConfig(passes=0)), "passes = 0: expected 1 or more"),
        (dict(objective="steerlm2"), "ratings is empty: the objective 'steerlm2' needs"),
        (
            dict(objective="steerlm2", policy_gradient=PolicyGradientConfig(ratings="good")),
            "ratings = 'good': expected the ratings",
        ),
        (
            dict(objective="steerlm2", policy_gradient=PolicyGradientConfig(ratings="a:1,a:2")),
            "ratings = 'a:1,a:2': expected the ratings",
        ),
        (
            dict(objective="steerlm2", policy_gradient=PolicyGradientConfig(ratings="a:40")),
            r"asks for a:40: expected one in config\.data\.label_range = \(0\.0, 4\.0\)",
        ),
        (dict(objective="ppo"), "config.critic.init is empty: name a reward model"),
        (
            dict(objective="ppo", critic=CriticConfig("m", smoothing=1.5)),
            "critic.smoothing = 1.5: expected 0 to 1",
        ),
        (
            dict(
                objective="ppo",
                critic=CriticConfig("m", optimizer=OptimizerConfig(1e-3, schedule="cosin")),
            ),
            "config.critic.optimizer.schedule = 'cosin': there are",
        ),
        (dict(objective="ipo"), "of a policy's own samples there are reinforce"),
    ],
)
def test_settings_that_do_not_fit(changes, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        validate(config_of(files, tmp_path, **changes))


def command(config, directory) -> list[str]:
    """What runs a config, as Python's arguments."""
    path = directory / f"{uuid.uuid4()}.py"
    names = "from rmjax.config import *\nfrom rmjax.runtime.sharding import MeshConfig\n"
    path.write_text(f"{names}def get_config(arg=None):\n    return {config!r}\n")
    return ["-m", "rmjax.align", f"--config={path}"]


@pytest.mark.slow
def test_two_processes_killed_and_continued_are_one(wide, tmp_path):
    """Step 4's samples are rewarded when both are killed; step 2 is the last that was saved."""
    rollouts = RolloutConfig(n=4, max_tokens=12, rows=8, mesh=MeshConfig(fsdp=2, tensor=4))
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    # A function, which process 0 calls, and a model, which both compute.
    rewards = config_of(wide, "x", "deadly").rewards | {
        "model": RewardConfig(str(wide / "reward"), value=NAMES[1], weight=0.1)
    }
    changes: Any = dict(mesh=mesh, rollout=rollouts, rewards=rewards, rows_per_device=1)
    configs = [config_of(wide, tmp_path / name, **changes) for name in ("one", "two")]
    run(configs[0], make_mesh=make_mesh)
    arguments = command(configs[1], tmp_path)
    # The samples of held-out prompts are rewarded first, then those of each step.
    with started(arguments, environment={"DIES": "5"}) as (first, second):
        assert first.wait().code == -signal.SIGKILL
        second.process.kill()
    assert steps_kept(tmp_path / "two") == ["2"]
    left = (tmp_path / "two" / "rollouts" / "step-000003.jsonl").read_bytes()
    first, second = run_all(arguments)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out.count("this run's, after step 2") == 1 and "step" not in second.out
    assert (tmp_path / "two" / "rollouts" / "step-000003.jsonl").read_bytes() == left
    for ours, theirs in zip(*(numbers(tmp_path / x) for x in ("one", "two")), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    for step in range(1, 5):
        one, two = (rollout(tmp_path / name, step) for name in ("one", "two"))
        assert [row["token_ids"] for row in one] == [row["token_ids"] for row in two]


@pytest.mark.slow
def test_a_function_that_raises_on_one_process_ends_both(files, tmp_path):
    config = config_of(files, tmp_path / "run", "broken", rows_per_device=1)
    first, second = run_all(command(config, tmp_path))
    assert (first.code, second.code) == (1, 1)
    assert "function.py:broken raised RuntimeError: the judge is ill" in first.err
    assert "judge" not in second.err + second.out


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(files, tmp_path):
    """Both save after the same step and end well."""
    config = config_of(files, tmp_path / "run", rows_per_device=4, steps=60)
    with started(command(config, tmp_path), devices=1) as both:
        both[0].wait_for("step 3/60")
        both[1].process.terminate()
        ended = [one.wait() for one in both]
    assert [one.code for one in ended] == [0, 0], ended
    saved = int(steps_kept(tmp_path / "run")[-1])
    assert f"stopped by SIGTERM, step {saved} of 60 is saved" in ended[0].out
    assert 3 <= saved < 60 and "step" not in ended[1].out
    assert [x["step"] for x in metrics(tmp_path / "run") if "loss" in x] == [*range(1, saved + 1)]
