import dataclasses
import json
import math
import sys
import types

import jax
import numpy as np
import pytest

import rmjax.train
import rmjax.training.experiment
from helpers.checks import known
from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from helpers.runs import (
    contents,
    metrics,
    parts,
    restore,
    run,
    seen_samples,
    steps_kept,
    tiny_config,
)
from helpers.targets import regression
from rmjax.checkpoints.manager import Checkpoints
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.checkpoints.provenance import provenance
from rmjax.data.batch import BATCH_AXES
from rmjax.data.batches import training_batches
from rmjax.data.planning import plan_steps
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.models.init import random_params
from rmjax.runtime.sharding import MeshConfig, make_mesh, put
from rmjax.training.experiment import pick_tokenizer
from rmjax.training.logger import MetricsLogger
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import abstract_state, init_state, make_train_step
from rmjax.training.validation import evaluate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from its first to its last step: 60 samples in eight steps, the last of four."""
    workdir = tmp_path_factory.mktemp("finished")
    samples: list = []
    config = tiny_config(workdir, steps=0, epochs=1.0, data__train="generated:60", eval_every=2)
    run(config, iterate=seen_samples(samples))
    return config, workdir, samples


def test_numbers_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint whose run lacks steps."""
    synced, save = [], Checkpoints.save

    def note_and_save(self, step, *rest, **more):
        assert synced[-1][-1]["step"] == step
        save(self, step, *rest, **more)

    monkeypatch.setattr(MetricsLogger, "sync", lambda self: synced.append(metrics(tmp_path)))
    monkeypatch.setattr(Checkpoints, "save", note_and_save)
    run(tiny_config(tmp_path, steps=4, epochs=0.0, eval_every=4, checkpoint_every=2))
    assert [[line["step"] for line in lines] for lines in synced] == [[1, 2], [1, 2, 3, 4, 4]]


def test_an_epoch_shows_every_sample_once(finished):
    _, _, samples = finished
    assert sorted(sample for step in samples for sample in step) == list(range(60))
    assert [len(step) for step in samples] == [8] * 7 + [4]


def test_every_step_is_reported_once(finished):
    config, workdir, samples = finished
    training = [line for line in metrics(workdir) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, len(samples) + 1))
    evaluations = [line["step"] for line in metrics(workdir) if "validation_loss" in line]
    assert evaluations == [2, 4, 6, 8]
    _, data, _ = parts(config)
    # Two responses to each prompt here; what both begin with is computed once if they fit a row.
    apart = [data.lengths[step].reshape(-1, 2).sum(axis=1) for step in samples]
    once = [sizes - data.shared[step[::2]] for sizes, step in zip(apart, samples)]
    length = max(length for _, length in json.loads((workdir / "rows.json").read_text())["rows"])
    assert [line["tokens"] for line in training] == [
        int(np.where(b <= length, b, a).sum()) for a, b in zip(apart, once)
    ]
    events = list((workdir / "tensorboard").iterdir())
    assert len(events) == 1 and events[0].stat().st_size > 1000


@pytest.mark.parametrize("rows", [{"data__row_length": 512}, {"rows_per_device": 7}])
def test_rows_do_not_move_the_losses(rows, tmp_path):
    """Those that the data choose, for a step without its longest sample others, and any others."""
    told = dict(data__validation="", steps=3, rows_per_device=4, optimizer__learning_rate=1e-2)
    run(tiny_config(tmp_path / "chosen", **told))
    run(tiny_config(tmp_path / "other", **told | rows))
    losses = [
        [[line[name] for line in metrics(tmp_path / run)] for name in ("loss", "grad_norm")]
        for run in ("chosen", "other")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert not (tmp_path / "other" / "rows.json").exists() or rows == {"rows_per_device": 7}


def test_it_learns(finished):
    _, workdir, _ = finished
    losses = [line["validation_loss"] for line in metrics(workdir) if "validation_loss" in line]
    assert losses[-1] < 0.8 * losses[0]


def test_the_run_is_on_record(finished):
    config, workdir, _ = finished
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["batch_size"] == 8
    assert record["versions"]["jax"] == jax.__version__
    data = json.loads((workdir / "data.json").read_text())
    assert data["train"]["samples"]["kept"] == 60
    assert data["validation"]["samples"]["kept"] == 16
    spec = json.loads((workdir / "model" / "rmjax.json").read_text())
    assert spec["attributes"] == list(config.data.attributes)


def test_a_finished_run_stays_as_it_is(finished, capsys):
    config, workdir, _ = finished
    before = contents(workdir)
    capsys.readouterr()
    run(config, make_program=lambda *_, **__: None)  # nothing is computed
    assert contents(workdir) == before
    shown = capsys.readouterr().out
    assert "step 8 of 8 is done" in shown
    assert "helpfulness" in shown and "Next:" in shown


def test_a_longer_last_epoch_cannot_leave_samples_out(finished):
    """The last step had what was left of its epoch; another plan has a full one there."""
    _, workdir, _ = finished
    before = contents(workdir)
    changed = tiny_config(workdir, steps=0, epochs=2.0, data__train="generated:60")
    with pytest.raises(UserError, match="had seen 60 samples"):
        run(changed)
    assert contents(workdir) == before


def test_a_run_longer_than_its_steps_is_done(finished, capsys):
    _, workdir, _ = finished
    before = contents(workdir)
    run(tiny_config(workdir, steps=2, data__train="generated:60"))
    assert "step 8 of 2 is done" in capsys.readouterr().out
    assert contents(workdir) == before


def test_wandb_is_neither_imported_nor_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with MetricsLogger(tmp_path, start=0, total=1, wandb="", config={}) as report:
        report.step(1, {"loss": 1.0, "grad_norm": 1.0}, 10, 20)
    assert metrics(tmp_path)[0]["padding"] == 0.5
    with pytest.raises(UserError, match=r"rmjax\[wandb\]"):
        MetricsLogger(tmp_path, start=0, total=1, wandb="project", config={})


def test_wandb_gets_what_the_file_gets(tmp_path, monkeypatch):
    logged: list = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: logged.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsLogger(tmp_path, start=0, total=1, wandb="project", config={"seed": 0}) as report:
        report.step(1, {"loss": 1.0, "grad_norm": 1.0}, 10, 20)
    options, (step, values), end = logged
    assert options["project"] == "project" and options["config"] == {"seed": 0}
    assert {"step": step, **values} == metrics(tmp_path)[0]
    assert end == "end"


def test_a_half_line_of_a_killed_run_is_taken_out(tmp_path):
    with MetricsLogger(tmp_path, start=0, total=9, wandb="", config={}) as report:
        for step in (1, 2, 3):
            report.step(step, {"loss": 1.0, "grad_norm": math.nan}, 10, 20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with MetricsLogger(tmp_path, start=2, total=9, wandb="", config={}) as report:
        report.step(3, {"loss": 2.0, "grad_norm": 1.0}, 10, 20)
    lines = metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert lines[0]["grad_norm"] is None


def spoil(at: int):
    """A replacement of `make_program` whose loss is infinite at one step."""
    original = rmjax.train.make_program

    def make(*args, **options):
        program = original(*args, **options)

        def spoiled(state, batch):
            if int(state.step) + 1 == at:
                head = state.params["head"]
                params = state.params | {"head": jax.device_put(head * np.inf, head.sharding)}
                state = state._replace(params=params)
            return program.step(state, batch)

        return program._replace(step=spoiled)

    return make


@pytest.mark.parametrize("at", [3, 5, 6])
def test_a_loss_that_is_not_finite_stops_the_run(at, tmp_path):
    """At a step that would be saved, between two, and at the last."""
    samples: list = []
    config = tiny_config(tmp_path / "run")
    with pytest.raises(UserError) as error:
        run(config, make_program=spoil(at), iterate=seen_samples(samples))
    message = str(error.value)
    assert f"step {at}: " in message
    _, data, _ = parts(config)
    named = message.split(" rows ")[-1]
    rows = sorted(int(data.rows[sample]) for sample in samples[at - 1])
    assert named == ", ".join(map(str, rows))
    assert steps_kept(tmp_path / "run") == ([] if at == 3 else ["3"])
    assert max(line["step"] for line in metrics(tmp_path / "run")) == at - 1


def test_a_learning_rate_too_large_saves_no_broken_weights(tmp_path):
    workdir = tmp_path / "run"
    config = tiny_config(workdir, optimizer__learning_rate=1e38, checkpoint_every=1)
    with pytest.raises(UserError, match=r"not finite|step \d+: loss"):
        run(config)
    for step in steps_kept(workdir):
        state, _ = restore(config, int(step))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)), step


def test_the_step_compiles_once():
    """However many micro-batches a batch has; and it writes over the state it is given."""
    config = tiny_config("unused")
    model, data, _ = parts(config)
    # Few long samples, then many: one, two and three micro-batches of two rows.
    plan = [np.arange(n) for n in (2, 6, 12, 4, 9)]
    batches = training_batches(data, plan, RowShape(2, 256, 4))
    schedule = make_schedule(config.optimizer, 5)
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract = abstract_state(model, optimizer, (".*",))
    step = make_train_step(model, regression, optimizer, schedule, (".*",), abstract)
    state = init_state(random_params(model, 0), optimizer, (".*",), abstract)
    counts, losses = [], []
    for number in range(len(batches)):
        batch = put(batches[number], BATCH_AXES, model.options.sharding)
        given = state
        state, found = step(given, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        counts.append(int(batch.microbatches))
        losses.append(float(found.loss))
    assert len(set(counts)) >= 3 and np.isfinite(losses).all()
    assert step._cache_size() == 1


@pytest.mark.slow
def test_micro_batches_do_not_change_the_step():
    """One micro-batch of eight rows, or three of two: the same gradient."""
    config = tiny_config("unused")
    model, data, _ = parts(config)
    schedule = make_schedule(config.optimizer, 5)
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract = abstract_state(model, optimizer, (".*",))
    plan, found = plan_steps(data, batch_size=8, seed=0, steps=6), []
    for rows in (8, 2):
        step = make_train_step(model, regression, optimizer, schedule, (".*",), abstract)
        batches = training_batches(data, plan, RowShape(rows, 256, 4))
        assert batches.microbatches == {8: 1, 2: 3}[rows]
        state = init_state(random_params(model, 0), optimizer, (".*",), abstract)
        _, metrics = step(state, put(batches[0], BATCH_AXES, model.options.sharding))
        found.append([float(metrics.loss), float(metrics.grad_norm)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_evaluation_is_exact_on_an_uneven_last_batch():
    config = tiny_config("unused", data__validation="generated:14")
    model, _, held_out = parts(config)
    held_out = known(held_out)
    batches = evaluation_batches(held_out, RowShape(2, 256, 4))
    rows = [int((batch.samples[0] >= 0).any(axis=1).sum()) for batch in batches]
    assert rows[-1] == 1 and len(rows) > 1
    params, score = random_params(model, 1), make_score(model)
    sharding = model.options.sharding
    found = score_data(score, params, batches, sharding)
    alone = np.concatenate(
        [
            np.asarray(
                score(
                    params, make_rows([[Segment([held_out.sequence(i)])]], 1, RowShape(1, 256, 1))
                )
            )
            for i in range(14)
        ]
    )[:, 0]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    evaluation = evaluate(score, params, batches, np.zeros(5), regression, sharding)
    expected = np.mean((alone.astype(np.float64) - held_out.labels) ** 2)
    assert evaluation.loss == pytest.approx(expected, rel=1e-6)
    assert [row.count for row in evaluation.attributes.values()] == [14] * 5
    assert evaluation.pairs is None


def test_scores_that_are_not_finite_name_the_sample():
    config = tiny_config("unused")
    model, _, held_out = parts(config)
    held_out = known(held_out)
    batches = evaluation_batches(held_out, RowShape(2, 256, 4))
    params = random_params(model, 1)
    params["head"] = params["head"] * np.nan
    with pytest.raises(UserError, match=r"16 held-out samples .* validation row 1;"):
        evaluate(
            make_score(model), params, batches, np.zeros(5), regression, model.options.sharding
        )


@pytest.mark.slow
def test_a_run_keeps_the_template_that_it_was_told_to_use(tmp_path):
    """So that scoring with it and what is made of it need no name."""
    init = save_hf(tmp_path / "hf", tiny_llama(max_position_embeddings=256), causal=True)
    short = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (init / "README.md").write_text("---\nlicense: llama3.1\ndatasets: [its/own]\n---\n")
    (init / "additional_chat_templates").mkdir()
    (init / "additional_chat_templates" / "short.jinja").write_text(short)
    (init / "chat_template.jinja").rename(init / "additional_chat_templates" / "long.jinja")
    config = tiny_config(
        tmp_path / "run",
        init=str(init),
        model=None,
        tokenizer="",
        steps=1,
        data__max_length=256,
        data__validation="",
    )
    with pytest.raises(
        UserError, match=r"none is called 'default': long, short\. Say which, with "
    ):
        run(config)
    run(dataclasses.replace(config, chat_template="short"))
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == short
    made = open_pretrained(str(tmp_path / "run"))
    assert made.tokenizer().chat_template == short
    assert (made.run, provenance(made)) == (tmp_path / "run", {"license": "llama3.1"})
    with pytest.raises(UserError, match=r"chat_template: was 'short', now 'long'"):
        run(dataclasses.replace(config, chat_template="long"))
    named = dataclasses.replace(config, tokenizer=str(init), chat_template="long")
    assert pick_tokenizer(named, None, 262).chat_template == byte_tokenizer().chat_template
    with pytest.raises(UserError, match="the tokenizer `bytes` has one template"):
        pick_tokenizer(dataclasses.replace(named, tokenizer="bytes"), None, 262)


def test_rows_must_divide_over_the_context_axis(tmp_path):
    config = tiny_config(tmp_path / "run", mesh=MeshConfig(fsdp=1, context=8), data__row_length=260)
    with pytest.raises(UserError, match=r"row_length: axis 1 has size 260.*context = 8"):
        run(config, make_mesh=make_mesh)


def test_nothing_is_read_twice_in_a_plan():
    """Steps that follow each other over epochs; see test_batches for the rest."""
    config = tiny_config("unused")
    _, data, _ = parts(config)
    steps = plan_steps(data, batch_size=8, seed=1, epochs=2.0)
    counts = np.bincount(np.concatenate(steps), minlength=64)
    assert set(counts) == {2}


@pytest.mark.slow
def test_another_attention_is_the_same_run(tmp_path, monkeypatch, capsys):
    """The TPUs' kernel, interpreted here: rows are aligned for it, and the run says so."""
    watched = ("loss", "grad_norm", "validation_loss")
    changes = dict(steps=2, eval_every=0, checkpoint_every=0, data__max_length=256)
    run(tiny_config(tmp_path / "cpu_flash", **changes))
    assert "attention cpu_flash" in capsys.readouterr().out
    monkeypatch.setattr(rmjax.training.experiment, "choose", lambda *unused: "splash")
    run(tiny_config(tmp_path / "splash", **changes))
    assert "attention splash" in capsys.readouterr().out
    found, expected = (
        [line[name] for line in metrics(tmp_path / run) for name in line if name in watched]
        for run in ("splash", "cpu_flash")
    )
    assert len(found) == 5
    assert found == pytest.approx(expected, rel=1e-5)


def test_attention_that_is_not_there_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"attention = 'splash': it is for TPUs.* of CPUs"):
        run(tiny_config(tmp_path, attention="splash"))
