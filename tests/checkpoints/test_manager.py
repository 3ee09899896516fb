import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rmjax.train
from helpers import forked
from helpers.runs import (
    assert_same_bits,
    contents,
    flags,
    metrics,
    numbers,
    on_one_device,
    parts,
    restore,
    run,
    seen_samples,
    steps_kept,
    tiny_config,
)
from helpers.targets import regression
from rmjax.checkpoints.manager import Checkpoints, best_checkpoint
from rmjax.checkpoints.orbax_arrays import open_array, with_checksums
from rmjax.config import HELPSTEER2, as_flat_dict
from rmjax.data.batch import BATCH_AXES
from rmjax.data.batches import training_batches
from rmjax.data.generated import generate
from rmjax.data.planning import plan_steps
from rmjax.data.row_layout import RowShape
from rmjax.errors import UserError
from rmjax.runtime.processes import Preemption
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh, put
from rmjax.training.logger import MetricsLogger
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import TrainState, abstract_state, make_train_step


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six steps without a break, evaluated and saved after 3 and 6."""
    workdir = tmp_path_factory.mktemp("six") / "run"
    run(tiny_config(workdir))
    return workdir


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three steps of the same run."""
    workdir = tmp_path_factory.mktemp("three") / "run"
    run(tiny_config(workdir, steps=3))
    return workdir


@pytest.fixture
def copy(three, tmp_path):
    """The three steps, to do with as a test likes."""
    return Path(shutil.copytree(three, tmp_path / "run", copy_function=shutil.copy2))


# ---- continuing ----------------------------------------------------------------------------------


def test_three_and_three_steps_are_six(six, copy):
    """With other evaluations, another saving and another directory; nothing of it is a number."""
    run(tiny_config(copy, eval_every=2, checkpoint_every=1))
    ours, stored = restore(tiny_config(copy))
    theirs, expected = restore(tiny_config(six))
    assert int(ours.step) == 6
    assert_same_bits(ours, theirs)
    assert stored["position"] == expected["position"]
    assert stored["config"] == as_flat_dict(tiny_config(copy, eval_every=2, checkpoint_every=1))
    lines = [line for line in numbers(copy) if "loss" in line]
    assert lines == [line for line in numbers(six) if "loss" in line]


def test_layers_are_stored_apart_and_an_embedding_is_not_cut_into_rows(three):
    params = three / "checkpoints" / "3" / "params"
    for path in ("embed", "layers/q", "head", "final_norm"):
        array = open_array(params, path)
        expected = tuple(array.shape)
        if path.startswith("layers/"):
            assert expected[0] > 1
            expected = (1, *expected[1:])
        assert array.chunk_layout.read_chunk.shape == expected, path


@pytest.mark.slow
def test_moments_in_bfloat16_continue_to_the_same_bits(tmp_path):
    """What is rounded at random is rounded alike: by the step's number."""
    change = dict(optimizer__moments="bfloat16", eval_every=0, checkpoint_every=0)
    for steps in (2, 4):
        run(tiny_config(tmp_path / "two", steps=steps, **change))
    run(tiny_config(tmp_path / "four", steps=4, **change))
    ours, _ = restore(tiny_config(tmp_path / "two", steps=4, **change))
    theirs, _ = restore(tiny_config(tmp_path / "four", steps=4, **change))
    assert int(ours.step) == 4
    assert "bfloat16" in {str(leaf.dtype) for leaf in jax.tree.leaves(ours.opt_state)}
    assert_same_bits(ours, theirs)


def test_a_continued_run_sees_the_other_samples(tmp_path):
    """Stopped after three of eight steps, an epoch still shows every sample once."""
    samples: list = []
    original = rmjax.train.finish_step

    def stop_at_three(step, *rest):
        original(step, *rest)
        if step == 3 and len(samples) <= 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def train_on():
        config = tiny_config(tmp_path / "run", steps=8, eval_every=0, checkpoint_every=0)
        run(config, iterate=seen_samples(samples), finish_step=stop_at_three)

    train_on()
    stopped = int(steps_kept(tmp_path / "run")[-1])
    assert stopped in (3, 4)
    del samples[stopped:]
    train_on()
    assert steps_kept(tmp_path / "run")[-1] == "8"
    assert sorted(sample for step in samples for sample in step) == list(range(64))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            dict(optimizer__learning_rate=1e-3),
            "optimizer.learning_rate: was 0.002, now 0.001",
        ),
        (dict(seed=7), "seed: was 0, now 7"),
        (
            dict(data__train="generated:66"),
            "data.train: was 'generated:64', now 'generated:66'",
        ),
        (
            dict(optimizer__schedule="cosine"),
            "optimizer.schedule: was 'constant', now 'cosine'",
        ),
        (dict(model__head_dim=16), "model.head_dim: was 8, now 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_config_is_refused_with_the_difference(copy, changes, difference):
    before = contents(copy)
    with pytest.raises(UserError) as error:
        run(tiny_config(copy, **changes))
    assert f"\n  {difference}\n" in str(error.value)
    assert contents(copy) == before


@pytest.mark.slow
def test_changed_data_are_refused(tmp_path):
    file = tmp_path / "ratings.jsonl"
    lines = [json.dumps(row) + "\n" for row in generate(64, "train")]
    file.write_text("".join(lines))
    config = tiny_config(tmp_path / "run", data__train=str(file), steps=3)
    run(config)
    before = contents(tmp_path / "run")
    file.write_text("".join([*lines[:-1], lines[0]]))
    with pytest.raises(UserError, match=r"ratings\.jsonl.*not those the run was started with"):
        run(dataclasses.replace(config, steps=4))
    assert contents(tmp_path / "run") == before
    file.write_text("".join(lines))
    run(dataclasses.replace(config, steps=4))
    assert steps_kept(tmp_path / "run")[-1] == "4"


def test_a_run_may_move(copy, tmp_path, six):
    moved = copy.rename(tmp_path / "elsewhere")
    run(tiny_config(moved))
    assert_same_bits(restore(tiny_config(moved))[0], restore(tiny_config(six))[0])


# ---- what is kept --------------------------------------------------------------------------------


def test_the_best_and_the_last_two_are_kept_and_nothing_else(tmp_path):
    """Validation is worst at the end here: the loss of each evaluation is made up."""
    workdir = tmp_path / "run"
    config = tiny_config(workdir, eval_every=1, checkpoint_every=2)
    run(config, evaluate=made_up([3.0, 1.0, 2.0, 1.5, 4.0, 5.0]))
    assert steps_kept(workdir) == ["2", "4", "6"]
    assert best_checkpoint(workdir)[0].name == "2"
    checkpoints = Checkpoints(workdir, clean=False)
    found = {step: e["validation_loss"] for step, e in checkpoints.evaluations.items()}
    checkpoints.close()
    assert found == {2: 1.0, 4: 1.5, 6: 5.0}


@pytest.mark.slow
def test_the_best_survives_a_restart(tmp_path):
    workdir = tmp_path / "run"
    config = tiny_config(workdir, eval_every=1, checkpoint_every=3, steps=3)
    run(config, evaluate=made_up([2.0, 1.0, 3.0]))
    assert steps_kept(workdir) == ["2", "3"]
    run(dataclasses.replace(config, steps=6), evaluate=made_up([1.5, 0.5, 4.0]))
    assert steps_kept(workdir) == ["5", "6"]


def test_without_validation_the_last_two_are_kept(tmp_path, capsys):
    workdir = tmp_path / "run"
    run(tiny_config(workdir, data__validation="", checkpoint_every=2, steps=5))
    assert steps_kept(workdir) == ["4", "5"]
    assert best_checkpoint(workdir)[0].name == "5"
    assert "validation_loss" not in (workdir / "metrics.jsonl").read_text()
    assert "Next:" in capsys.readouterr().out


def made_up(losses):
    """A replacement of `evaluate` with these losses and the true table."""
    original, losses = rmjax.train.evaluate, iter(losses)
    return lambda *args: original(*args)._replace(loss=next(losses))


def test_a_checkpoint_is_what_a_run_that_stops_there_has(tmp_path, three):
    """Steps that follow do not reach into what is still being saved."""
    config = tiny_config(tmp_path / "run")
    run(config, evaluate=made_up([1.0, 2.0]))
    assert steps_kept(tmp_path / "run") == ["3", "6"]
    ours, theirs = restore(config, 3), restore(tiny_config(three), 3)
    assert_same_bits(ours[0], theirs[0])
    assert ours[1]["position"] == theirs[1]["position"]


def test_saving_does_not_see_what_happens_to_donated_buffers(tmp_path):
    """Large arrays, overwritten in place as soon as saving lets go of them."""
    sharding = Sharding(on_one_device(MeshConfig())).replicated
    values = np.random.default_rng(0).normal(size=(4, 1024, 1024)).astype(np.float32)

    def state():
        arrays = [jax.device_put(values + n, sharding) for n in range(2)]
        step = jax.device_put(np.int32(1), sharding)
        return TrainState(step, {"embed": arrays[0]}, {"mu": arrays[1]})

    first = state()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), first
    )
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    given = state()
    spoil(given)  # compiled beforehand, and seen to write in place where nothing is saved
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, first.items(), position={}, config={}, evaluation=None)
    jax.block_until_ready(spoil(first))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert_same_bits(TrainState.from_items(checkpoints.restore(1, abstract.items())), state())
    checkpoints.close()


# ---- damage --------------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_ignored_and_cleaned_up(copy, six):
    half = copy / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "3" / "params", half / "params")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    checkpoints = Checkpoints(copy, clean=False)
    assert checkpoints.latest == 3
    checkpoints.close()
    assert best_checkpoint(copy)[0].name == "3" and half.exists()
    run(tiny_config(copy))
    assert not half.exists()
    assert numbers(copy) == numbers(six)


@pytest.mark.parametrize(
    "what",
    [
        "params/d",
        "params/_METADATA",
        "params/ocdbt.process_0",
        "params",
        "optimizer/d",
        "optimizer/manifest.ocdbt",
        "optimizer",
        "_CHECKPOINT_METADATA",
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_refused_and_left(copy, what):
    gone = copy / "checkpoints" / "3" / what
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    before = contents(copy)
    with pytest.raises(UserError, match="checkpoints/3: incomplete or damaged") as error:
        run(tiny_config(copy))
    assert len(str(error.value)) < 800
    assert contents(copy) == before
    del error
    gc.collect()  # what Orbax leaves behind complains here and not in other tests


def test_without_the_damaged_one_the_run_goes_on_from_the_one_before(tmp_path):
    workdir = tmp_path / "run"
    config = tiny_config(workdir, eval_every=2, checkpoint_every=2, steps=4)
    run(config, evaluate=made_up([1.0, 2.0]))
    whole = numbers(workdir)
    assert steps_kept(workdir) == ["2", "4"]
    shutil.rmtree(workdir / "checkpoints" / "4")
    run(config)
    assert "4" in steps_kept(workdir)
    assert [line for line in numbers(workdir) if "loss" in line] == [
        line for line in whole if "loss" in line
    ]


def test_another_format_version_is_refused(copy):
    file = copy / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"]["format_version"] = "9.9"
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"checkpoints/3: format version '9\.9'.*reads '0\.1'"):
        run(tiny_config(copy))


@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "file", ["_CHECKPOINT_METADATA", "metrics/metrics", "params/_METADATA", "params/manifest.ocdbt"]
)
def test_a_file_cut_in_half_is_a_damaged_checkpoint(copy, file):
    cut = copy / "checkpoints" / "3" / file
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    before = contents(copy)
    with pytest.raises(UserError, match=r"checkpoints.*(damaged|cannot be read)"):
        run(tiny_config(copy))
    assert contents(copy) == before
    gc.collect()


@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "file",
    [
        "params/ocdbt.process_0/d/*",
        "optimizer/ocdbt.process_0/d/*",
        "params/manifest.ocdbt",
        "_CHECKPOINT_METADATA",
        "metrics/metrics",
    ],
)
def test_a_flipped_bit_is_noticed_and_the_step_before_is_named(copy, file):
    """Random weights do not compress, so that nothing but a checksum tells."""
    (flipped,) = (copy / "checkpoints" / "3").glob(file)
    content = bytearray(flipped.read_bytes())
    at = len(content) // 2
    if "METADATA" in file or "metrics" in file:  # a digit becomes another
        begin = max(0, content.find(b'"position"'))
        at = next(i for i in range(begin, len(content)) if content[i] in b"02468")
    content[at] ^= 1
    flipped.write_bytes(content)
    shutil.copytree(copy / "checkpoints" / "3", copy / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"checkpoints/3: incomplete or damaged.*before it, step 2"):
        run(tiny_config(copy))
    gc.collect()


def test_a_directory_that_is_gone_is_not_made_anew(tmp_path):
    """Orbax would save there, and the run would be nothing but its last step."""
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(UserError, match="checkpoints: removed while the run went on"):
        checkpoints.save(1, {}, position={}, config={}, evaluation=None)
    assert not (tmp_path / "checkpoints").exists()


def test_saves_leave_neither_threads_nor_files_open(tmp_path):
    """Orbax's way of saving keeps a thread and three files until it is asked what came of it."""
    checkpoints, files = Checkpoints(tmp_path), []
    array = jax.device_put(np.zeros(2, np.float32))
    for step in range(1, 5):
        checkpoints.save(step, {"params": array}, position={}, config={}, evaluation=None)
        checkpoints._wait()
        assert not [t.name for t in threading.enumerate() if "_run_loop" in t.name]
        files.append(len(os.listdir("/proc/self/fd")))
    checkpoints.close()
    assert files[3] < files[1] + 6


def test_a_run_that_begins_again_has_no_metrics_of_before(tmp_path):
    """An alignment that was killed before its first checkpoint would have step 0 twice."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "held_out/reward": 1.0}\n')
    config: Any = {}
    with MetricsLogger(tmp_path, start=0, total=1, wandb="", config=config) as report:
        report.numbers(0, {"held_out/reward": 2.0})
    assert metrics(tmp_path) == [{"step": 0, "held_out/reward": 2.0}]


def test_torn_lines_of_metrics_are_dropped(copy, six):
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'1\n{"step": 4, "x\xff')
    run(tiny_config(copy))
    assert numbers(copy) == numbers(six)


def test_a_save_that_is_given_up_is_one_message(tmp_path, monkeypatch):
    """Orbax waits by the clock on the wall, which may be put forward."""

    def late(*_):
        raise TimeoutError("Timeout waiting for key")

    checkpoints = Checkpoints(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="the clock was put forward"),
    ):
        patch.setattr(checkpoints._orbax, "close", late)
        checkpoints.close()
    checkpoints.close()


def test_no_checkpoint_yet_is_said(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        best_checkpoint(tmp_path)


# ---- the directory -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/3/x", "model/config.json", ".hidden"])
def test_a_directory_with_something_else_is_refused_and_left(tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="run: not empty, and not an rmjax run"):
        run(tiny_config(tmp_path / "run"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "text", ['{"model_type": "llama"}', '{"format": "rmjax-run"}', "[]", "{", ""]
)
def test_another_programs_config_json_is_refused_and_left(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        run(tiny_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


def test_a_run_that_failed_before_its_first_step_can_be_mended(tmp_path):
    """Whatever failed: data, tokenizer, first weights, or writing down what is run."""
    workdir = tmp_path / "run"

    def fail(*_):
        raise UserError("broken")

    with pytest.raises(UserError, match="generated:COUNT"):
        run(tiny_config(workdir, data__train="generated:many"))
    make = rmjax.train.make_program

    def without_start(*arguments, **options):
        return make(*arguments, **options)._replace(start=fail)

    for patches in (
        {"first_params": fail},
        {"record_run": fail},
        {"make_program": without_start},
    ):
        with pytest.raises(UserError, match="broken"):
            run(tiny_config(workdir), **patches)
    run(tiny_config(workdir, seed=1))
    assert steps_kept(workdir)[-1] == "6"


def test_model_files_that_a_kill_left_out_are_written(copy):
    shutil.rmtree(copy / "model")
    (copy / "model").mkdir()
    (copy / "model" / "config.json").write_text("{")
    run(tiny_config(copy, steps=4))
    assert json.loads((copy / "model" / "config.json").read_text())["model_type"] == "llama"
    assert (copy / "model" / "rmjax.json").exists()


# ---- meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_state_of_one_device_is_restored_on_eight(three, mesh):
    sharding = Sharding(make_mesh(MeshConfig(**mesh)))
    one, _ = restore(tiny_config(three))
    many, _ = restore(tiny_config(three), sharding=sharding)
    assert_same_bits(one, many)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(many)} == {8}
    held = {shard.data.shape for shard in many.params["layers"]["gate"].addressable_shards}
    assert held == {(2, 32 // mesh["fsdp"], 64 // mesh.get("tensor", 1))}


def test_a_run_of_one_device_goes_on_on_eight(three):
    config = tiny_config(three)
    schedule = make_schedule(config.optimizer, 6)
    optimizer = make_optimizer(config.optimizer, schedule)
    model, data, _ = parts(config)
    plan, losses = plan_steps(data, batch_size=8, seed=0, steps=6), []
    eight = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for mesh, rows in ((on_one_device(config.mesh), 2), (eight, 8)):
        sharding = Sharding(mesh)
        state, metadata = restore(config, sharding=sharding)
        options = dataclasses.replace(model.options, sharding=sharding)
        model = dataclasses.replace(model, options=options)
        batches = training_batches(data, plan, RowShape(rows, 256, 4))
        abstract = abstract_state(model, optimizer, (".*",))
        step = make_train_step(model, regression, optimizer, schedule, (".*",), abstract)
        for number in range(metadata["position"]["next_step"], 6):
            state, found = step(state, put(batches[number], BATCH_AXES, sharding))
            losses.append(float(jax.block_until_ready(found).loss))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)


# ---- signals and kills ---------------------------------------------------------------------------

# Trains as the command does, but sends itself a signal in a step, once checkpoint 3 is on disk.
_SIGNALLED = """
import os, pathlib, signal, sys, time
import rmjax.train
from rmjax.training.command_line import run_with_config

at, number, workdir = int(sys.argv.pop()), int(sys.argv.pop()), pathlib.Path(sys.argv.pop())
finish = rmjax.train.finish_step

def finish_step(step, *rest):
    finish(step, *rest)
    if step == at:
        while not (workdir / "checkpoints" / "3").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

rmjax.train.finish_step = finish_step
run_with_config(rmjax.train.train)
"""


def command(config, *, signal_at: tuple[int, int] | None = None):
    program = ["-m", "rmjax.train", *flags(config)]
    if signal_at:
        program = ["-c", _SIGNALLED, *flags(config), config.workdir, *map(str, signal_at)]
    return forked.run(program)


@pytest.mark.slow
def test_a_killed_run_ends_where_a_whole_one_does(tmp_path):
    whole, broken = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "broken")
    assert command(whole).returncode == 0

    killed = command(broken, signal_at=(signal.SIGKILL, 5))
    assert killed.returncode == -signal.SIGKILL
    assert steps_kept(tmp_path / "broken")[0] == "3"
    assert max(line["step"] for line in metrics(tmp_path / "broken")) == 5

    # Steps 4 and 5 again, since they were not saved; then a polite signal.
    stopped = command(broken, signal_at=(signal.SIGTERM, 4))
    assert stopped.returncode == 0, stopped.stderr
    saved = int(steps_kept(tmp_path / "broken")[-1])
    assert saved in (4, 5)
    assert f"stopped by SIGTERM, step {saved} of 6 is saved" in stopped.stdout
    assert "Traceback" not in stopped.stderr

    done = command(broken)
    assert done.returncode == 0, done.stderr
    assert f"this run's, after step {saved}" in done.stdout
    assert_same_bits(restore(broken)[0], restore(whole)[0])
    ours, theirs = (
        [line for line in numbers(Path(config.workdir)) if "loss" in line]
        for config in (broken, whole)
    )
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert ours == theirs
    assert restore(broken)[1]["position"] == restore(whole)[1]["position"]

    before = contents(tmp_path / "broken")
    again = command(broken)
    assert again.returncode == 0 and "step 6 of 6 is done" in again.stdout
    assert "helpfulness" in again.stdout
    assert contents(tmp_path / "broken") == before


@pytest.mark.slow
def test_a_command_that_fails_says_why_in_one_line(three, tmp_path):
    """Damage and numbers that are not finite: no traceback, neither ours nor Orbax's."""
    damaged = shutil.copytree(three, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints" / "3" / "optimizer" / "d")
    broken = tiny_config(tmp_path / "infinite", optimizer__learning_rate=1e38, checkpoint_every=1)
    for config, reason in (
        (tiny_config(damaged), "incomplete or damaged"),
        (broken, "finite|loss"),
    ):
        failed = command(config)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1, failed.stderr
        assert any(word in failed.stderr for word in reason.split("|"))
        assert "Traceback" not in failed.stdout


def test_sigterm_is_noticed_within_only(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested(2)
    assert signal.getsignal(signal.SIGTERM) == before


# ---- full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", *size], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 60_000], ids=["none", "some"])
@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_destroys_nothing(small_disk, copy, six, room):
    """No room for a line of metrics, or room for it but not for a checkpoint."""
    workdir = small_disk / "run"
    shutil.copytree(copy, workdir)
    before = {k: v[0] for k, v in contents(workdir).items() if not k.startswith("tensorboard")}
    finish = rmjax.train.finish_step

    def fill_up(step, *rest):
        finish(step, *rest)
        if step == 4:
            disk = os.statvfs(small_disk)
            filler = b"x" * max(0, disk.f_bavail * disk.f_frsize - room)
            (small_disk / "filler").write_bytes(filler)

    for attempt in (fill_up, finish):
        with pytest.raises(UserError, match="the disk is full while writing"):
            run(tiny_config(workdir, eval_every=1), finish_step=attempt)
        after = {k: v[0] for k, v in contents(workdir).items()}
        for name, content in before.items():
            # A continued run writes its new config down first, and adds to its metrics.
            if name not in ("config.json", "metrics.jsonl"):
                assert after[name] == content, name
        assert json.loads(after["config.json"])["format"] == "rmjax-run"
        assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    gc.collect()

    (small_disk / "filler").unlink()
    run(tiny_config(workdir, eval_every=1))
    assert_same_bits(restore(tiny_config(workdir))[0], restore(tiny_config(six))[0])
    lines = [line for line in numbers(workdir) if "loss" in line]
    assert lines == [line for line in numbers(six) if "loss" in line]


def test_other_validation_data_are_refused(tmp_path):
    """The best checkpoint is found by comparing losses, which must be of the same data."""
    rows = [
        {"prompt": f"p {n}", "response": f"r {n}", **dict.fromkeys(HELPSTEER2, n % 5)}
        for n in range(4)
    ]
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tmp_path / "run")
    config.data.validation, config.steps = str(file), 2
    run(config)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    config.steps = 4
    with pytest.raises(UserError, match=r"validation\.jsonl: the data"):
        run(config)


def test_an_orbax_that_codes_chunks_differently_is_said(monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils as orbax

    monkeypatch.setattr(orbax, "_build_zarr3_metadata", lambda *unused: {"codecs": []})
    with_checksums()
    with pytest.warns(UserWarning, match="no checksum of their numbers"):
        assert orbax._build_zarr3_metadata((1,), (1,), False) == {"codecs": []}
    monkeypatch.delattr(orbax, "_build_zarr3_metadata")
    with pytest.warns(UserWarning, match="install orbax-checkpoint"):
        with_checksums()
