"""The report of a training run: of a real one, of one that was killed, of what is none."""

import fcntl
import json
import shutil

import numpy as np
import pytest

from helpers import forked
from helpers.runs import metrics, run, tiny_config
from rmjax.errors import UserError
from rmjax.report import report_run
from rmjax.reports.runs.run_directory import read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report") / "tiny<run>"
    run(tiny_config(workdir, steps=6, eval_every=2))
    return workdir


def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_report_holds_what_the_run_wrote(finished, tmp_path):
    document, files = report_run(str(finished), str(tmp_path / "out"))
    page, text, numbers = (file.read_text() for file in files)
    found, lines = json.loads(numbers), metrics(finished)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    assert found["format"] == "rmjax.report.run/1"
    assert found["steps"]["step"] == [1, 2, 3, 4, 5, 6]
    for field in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "padding"):
        assert found["steps"][field] == [line[field] for line in steps]
    assert [e["validation_loss"] for e in found["evaluations"]] == [
        line["validation_loss"] for line in evaluations
    ]
    for record, line in zip(found["evaluations"], evaluations):
        assert record["attributes"]["verbosity"]["mse"] == line["verbosity/mse"]
        assert len(record["attributes"]) == 5 and record["pairs"] is None
    summary = found["summary"]
    best = min(evaluations, key=lambda line: line["validation_loss"])
    assert summary["best_step"] == best["step"]
    assert summary["final_loss"] == pytest.approx(np.mean([line["loss"] for line in steps]))
    assert summary["tokens"] == sum(line["tokens"] for line in steps)
    assert summary["median_tokens_per_second"] == pytest.approx(
        np.median([line["tokens_per_second"] for line in steps[1:]])
    )
    assert found["config"] == json.loads((finished / "config.json").read_text())["config"]
    assert found["state"] == {
        "going_on": False,
        "last_step": 6,
        "planned_steps": 6,
        "checkpoints": [3, 6] if best["step"] == 3 else found["state"]["checkpoints"],
    }
    assert document.subtitle == "Finished: 6 steps."
    assert "tiny&lt;run&gt;" in page and "tiny&lt;run&gt;" in text
    assert f"{best['helpfulness/mse']:.3f}" in page


def test_twice_is_the_same_and_the_run_stays_as_it_was(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    before = {p: p.read_bytes() for p in run_.rglob("*") if p.is_file()}
    _, files = report_run(str(run_))
    assert [file.parent for file in files] == [run_ / "report"] * 3
    first = [file.read_bytes() for file in files]
    _, files = report_run(str(run_))
    assert [file.read_bytes() for file in files] == first
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_that_was_killed(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    lines = (run_ / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (run_ / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 4, "lo')
    document, files = report_run(str(run_))
    found = json.loads(files[2].read_text())
    assert found["steps"]["step"] == [1, 2, 3]
    assert "step 3 of 6" in document.subtitle
    assert "cannot be read" in files[0].read_text()


def test_a_run_without_evaluations_or_steps(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    lines = [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
    (run_ / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if "loss" in line)
    )
    _, files = report_run(str(run_))
    assert "There is no evaluation" in files[0].read_text()
    assert json.loads(files[2].read_text())["evaluations"] == []
    (run_ / "metrics.jsonl").unlink()
    (run_ / "data.json").unlink()
    _, files = report_run(str(run_))
    assert "has not finished a step" in files[0].read_text()
    assert json.loads(files[2].read_text())["summary"]["final_loss"] is None


def test_a_loss_that_is_not_finite_is_said(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    with open(run_ / "metrics.jsonl", "a") as file:
        print('{"step": 7, "loss": null, "grad_norm": null}', file=file)
    _, files = report_run(str(run_))
    assert "not finite at step 7" in files[0].read_text()
    (run_ / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    _, files = report_run(str(run_))
    assert "not finite at step 1" in files[0].read_text()


def test_preference_pairs(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    pairs = {
        "pairs/pairs": 50,
        "pairs/accuracy": 0.625,
        "pairs/low": 0.5,
        "pairs/high": 0.75,
        "pairs/mean_margin": None,
        "pairs/accuracy_at_strength_1": 0.5,
        "pairs/accuracy_at_strength_2": 0.875,
    }
    with open(run_ / "metrics.jsonl", "w") as file:
        for step in (1, 2):
            print(json.dumps({"step": step, "loss": 1.0, "tokens": 5}), file=file)
            print(json.dumps({"step": step, "validation_loss": 1 / step, **pairs}), file=file)
    _, files = report_run(str(run_))
    page, _, numbers = (file.read_text() for file in files)
    found = json.loads(numbers)["evaluations"][1]
    assert found["pairs"]["accuracy_at_strength_2"] == 0.875
    assert found["pairs"]["mean_margin"] is None
    assert "0.500 to 0.750" in page and "f-pairs-strength" in page


def test_a_run_that_goes_on_is_seen_and_not_disturbed(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    with open(run_ / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        going_on = read_run(run_).going_on
        assert going_on in (True, None)  # None where the file system hides it
    assert not read_run(run_).going_on


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "no config.json"),
        ("{}", "'format' is None"),
        ('{"format": "other", "config": {}}', "'other'"),
        ("{", "not readable as JSON"),
    ],
)
def test_what_is_no_run_is_an_error(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        report_run(str(tmp_path))
    assert not (tmp_path / "report").exists()


def test_the_command(finished, tmp_path):
    command = ["-m", "rmjax.report"]
    done = forked.run([*command, finished, f"--out={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stderr
    assert "Finished: 6 steps." in done.stdout and "report.html" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()
    done = forked.run([*command, tmp_path])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "not a training run" in done.stderr


def test_epochs_of_pairs_are_of_two_responses_each(finished, tmp_path):
    run_ = copy(finished, tmp_path)
    record = json.loads((run_ / "config.json").read_text())
    record["config"] |= {"steps": 0, "epochs": 2.0, "batch_size": 8}
    (run_ / "config.json").write_text(json.dumps(record))
    # ten pairs: twenty responses, of 30 tokens on average
    data = {"samples": {"read": 12, "kept": 10}, "tokens": {"mean": 30.0, "total": 600, "max": 60}}
    (run_ / "data.json").write_text(json.dumps({"train": {"source": "x", "labels": {}} | data}))
    assert read_run(run_).planned == 5
