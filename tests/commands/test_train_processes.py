"""Two processes with four devices each, against one process with eight."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import rmjax.train
from helpers.launching import LIMIT, run_all, started
from helpers.runs import flags, metrics, numbers, restore, steps_kept, tiny_config
from rmjax.errors import UserError
from rmjax.runtime.processes import _explain
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.workdir import LOCK, open_workdir

# Trains as the command does. By its variables it puts down the samples it got and the states that
# were saved and restored, and misbehaves at some place of the program.
PROGRAM = ["-m", "helpers.saboteur"]
SAMPLES = 60
MESH = MeshConfig(data=2, fsdp=4)


def config_of(workdir, **changes):
    """One epoch of 60 samples in eight steps, the last of four; 18 held-out samples."""
    defaults = dict(
        data__train=f"generated:{SAMPLES}",
        data__validation="generated:18",
        epochs=1.0,
        steps=0,
        rows_per_device=1,
        mesh=MESH,
    )
    return tiny_config(workdir, **(defaults | changes))


def arguments(config) -> list[str]:
    return [*PROGRAM, *flags(config)]


# Gloo's threads write this in parts, so that two of them may share a line or part one.
GLOO = "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :"


def said(text: str) -> list[str]:
    """Lines of output, without what JAX's libraries say about connections and programs."""
    words = re.compile("|".join(map(re.escape, sorted(GLOO.split(), key=len, reverse=True))))
    lines = [line for line in text.splitlines() if not line.startswith(("W1", "I1", "W0", "I0"))]
    return [line for line in lines if re.sub(r"[\d\s]", "", words.sub("", line))]


def flat(state) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_is(state, dump: Path) -> None:
    """Whether a state is, bit for bit, the one that two processes held and put down."""
    ours, theirs = flat(state), np.load(dump)
    assert ours.keys() == set(theirs.files) and len(ours) > 20
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def stored(workdir, step: int, mesh: MeshConfig = MESH):
    """A checkpoint, as one process reads it onto its eight devices."""
    return restore(config_of(workdir), step, Sharding(make_mesh(mesh)))[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run on one process with eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    rmjax.train.train(config_of(workdir))
    return workdir


@dataclasses.dataclass
class Finished:
    workdir: Path
    dumps: Path
    outputs: list


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run on two processes with four devices each."""
    root = tmp_path_factory.mktemp("two")
    config = config_of(root / "run")
    environment = {"SABOTEUR_DUMPS": str(root)}
    outputs = run_all(arguments(config), environment=environment)
    assert [ended.code for ended in outputs] == [0, 0], outputs
    return Finished(root / "run", root, outputs)


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_compute_a_reference_together(tmp_path):
    """A policy that is its own reference has no margin: so the loss is log 2."""
    pairs = dict(objective="dpo", data__compare="helpfulness", data__validation="")
    config = config_of(tmp_path / "run", epochs=0, steps=1, **pairs)
    outputs = run_all(arguments(config), environment={"RMJAX_CACHE": str(tmp_path / "cache")})
    assert [ended.code for ended in outputs] == [0, 0], outputs
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(one, two):
    ours, theirs = numbers(two.workdir), numbers(one)
    assert [line["step"] for line in ours] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            # A correlation of 18 scores has no more digits than their differences have.
            tolerance = 1e-4 if name.endswith(("pearson",)) else 1e-5
            assert mine[name] == pytest.approx(other[name], rel=tolerance), (mine["step"], name)


@pytest.mark.slow
def test_each_sample_is_on_one_process_and_once(two):
    parts = [np.load(two.dumps / f"samples-{i}.npy") for i in range(2)]
    assert min(map(len, parts)) > 0
    assert sorted(np.concatenate(parts).tolist()) == list(range(SAMPLES))


@pytest.mark.slow
def test_one_process_speaks_and_writes(two):
    first, second = two.outputs
    assert first.out.count("step 8/8") == 1 and "held-out data" in first.out
    assert "processes   2 (flags)" in first.out
    assert said(second.out) == [] and said(second.err) == []
    assert len(list((two.workdir / "tensorboard").iterdir())) == 1
    assert json.loads((two.workdir / "config.json").read_text())["devices"] == "8 x cpu"


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_two_processes_save_any_mesh_restores(two):
    for step in steps_kept(two.workdir):
        for mesh in (MESH, MeshConfig(), MeshConfig(fsdp=2, tensor=2, data=2)):
            assert_is(stored(two.workdir, int(step), mesh), two.dumps / f"saved-{step}.npz")


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_and_back(tmp_path, two):
    workdir = tmp_path / "run"

    def on_two(**changes):
        environment = {"SABOTEUR_DUMPS": str(tmp_path)}
        config = config_of(workdir, **changes)
        outputs = run_all(arguments(config), environment=environment)
        assert [ended.code for ended in outputs] == [0, 0], outputs

    on_two(steps=3, epochs=0)
    assert_is(stored(workdir, 3, MeshConfig(fsdp=8)), tmp_path / "saved-3.npz")
    rmjax.train.train(config_of(workdir, steps=6, epochs=0, mesh=MeshConfig(fsdp=8)))
    between = stored(workdir, 6)
    on_two()
    assert_is(between, tmp_path / "restored-6.npz")
    losses = [
        [line["loss"] for line in numbers(w) if "loss" in line] for w in (workdir, two.workdir)
    ]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ---- kills and signals ---------------------------------------------------------------------------


def ended_by_loss_of(process: int, ended) -> bool:
    """By our own message if a connection broke, by JAX's where only heartbeats were missed."""
    ours, theirs = f"process {process} does not answer any more", "another task died"
    return (ended.code == 1 and ours in ended.err) or (ended.code < 0 and theirs in ended.err)


@pytest.mark.slow
def test_a_broken_run_ends_where_a_whole_one_does(tmp_path, two):
    """Process 1 killed, then process 0, then SIGTERM to process 1; then the end."""
    workdir = tmp_path / "run"
    config = config_of(workdir, checkpoint_every=2)

    def go(plan: str):
        environment = {"SABOTEUR": plan, "SABOTEUR_HEARTBEAT": "20"}
        return run_all(arguments(config), environment=environment)

    first, second = go(f"1 kill {signal.SIGKILL} 3")
    assert second.code == -signal.SIGKILL and ended_by_loss_of(1, first), first
    assert steps_kept(workdir)[-1] == "2"

    first, second = go(f"0 kill {signal.SIGKILL} 5")
    assert first.code == -signal.SIGKILL and ended_by_loss_of(0, second), second
    assert steps_kept(workdir)[-1] == "4"

    first, second = go(f"1 kill {signal.SIGTERM} 5")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    saved = int(steps_kept(workdir)[-1])
    assert 5 <= saved < 8 and f"stopped by SIGTERM, step {saved} of 8 is saved" in first.out

    assert [ended.code for ended in go("")] == [0, 0]
    assert_is(stored(workdir, 8), two.dumps / "saved-8.npz")
    losses = [
        [line["loss"] for line in metrics(w) if "loss" in line] for w in (workdir, two.workdir)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_does_not_hang_the_others(victim, tmp_path):
    """Its connections stay open; only its heartbeats stop, as those of a lost machine do."""
    config = config_of(tmp_path / "run")
    plan = {"SABOTEUR": f"{victim} kill {signal.SIGSTOP} 1", "SABOTEUR_HEARTBEAT": "10"}
    with started(arguments(config), environment=plan) as running:
        left = running[1 - victim].wait()
        assert ended_by_loss_of(victim, left), left


# ---- failures ------------------------------------------------------------------------------------


def fail(config, plan: str = "", each=None, **environment):
    with started(
        arguments(config), environment=environment | {"SABOTEUR": plan}, each=each
    ) as running:
        outputs = [one.wait(LIMIT) for one in running]
    assert [ended.code for ended in outputs] == [1, 1], outputs
    lines = said(outputs[0].err) + said(outputs[1].err)
    assert len(lines) == 1, outputs
    return lines[0]


def test_processes_that_disagree_are_told_where(tmp_path):
    each = [[], ["--config.seed=1", "--config.data.max_length=200"]]
    message = fail(config_of(tmp_path / "run"), each=each)
    assert message.startswith("error: process 1: its config differs from that of process 0")
    assert "data.max_length is 200, there 256; seed is 1, there 0" in message
    assert not (tmp_path / "run").exists()


def test_other_versions_are_told(tmp_path):
    message = fail(config_of(tmp_path / "run"), "1 version")
    assert "process 1: " in message and "jax is '0.0.1', there " in message


def test_an_error_of_process_0_ends_both(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    assert fail(config_of(tmp_path / "run")) == (
        f"error: {tmp_path}/run: not empty, and not an rmjax run; choose another --config.workdir"
    )


def test_an_error_of_process_1_ends_both(tmp_path):
    message = fail(config_of(tmp_path / "run"), "1 cache")
    assert message.startswith("error: process 1: the cache in /dev/null cannot be written")


def test_a_directory_that_is_not_shared_is_noticed(tmp_path):
    message = fail(config_of(tmp_path / "run"), "1 elsewhere")
    assert "process 1: " in message and "file system that all processes share" in message


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_said_once(tmp_path):
    config = config_of(tmp_path / "run", optimizer__learning_rate=1e38)
    assert "step" in fail(config)


def test_the_failure_that_explains_most_is_printed():
    user, bug = {"kind": "user", "text": "x"}, {"kind": "bug", "text": "Traceback\nKeyError"}
    broken = {"kind": "jax", "text": "Traceback\nClosed by peer"}
    assert _explain({0: bug, 3: user, 4: user}, [1]) == "error: process 3: x"
    assert _explain({0: user}, []) == "error: x"
    assert _explain({0: broken, 2: bug}, []) == "process 2: Traceback\nKeyError"
    assert _explain({0: broken}, []) == "Traceback\nClosed by peer"
    lost = _explain({0: broken}, [1, 2])
    assert lost.startswith("error: process 1, 2 does not answer") and "(Closed by peer)" in lost
    assert _explain({1: bug}, [2]).startswith("process 1: Traceback\nKeyError\nerror: process 2")


# ---- two runs in one directory -------------------------------------------------------------------


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    config = config_of(tmp_path / "run")
    with open_workdir(config), pytest.raises(UserError, match="another run is going on there"):
        rmjax.train.train(config)
    with open_workdir(config):  # which is over
        pass


def test_the_lock_of_a_killed_run_locks_nobody_out(tmp_path):
    config = config_of(tmp_path / "run")
    environment = {"SABOTEUR": "0 hold"}
    with started(arguments(config), processes=1, devices=8, environment=environment) as (other,):
        other.wait_for("held")
        with pytest.raises(UserError, match="another run is going on there"):
            rmjax.train.train(config)
        other.process.kill()
        other.process.join()
        assert (tmp_path / "run" / LOCK).exists()
        with open_workdir(config):
            pass
