"""The page of an alignment run: its numbers by hand, what it warns of, and what it survives."""

import json
import shutil

import numpy as np
import pytest

from helpers.reports import HOSTILE, add_evaluation, add_line, prompt_rows, write_alignment
from helpers.reports import write_lines as write
from rmjax.report import report_run
from rmjax.reports.alignments.alignment_files import read_alignment
from rmjax.reports.alignments.page import alignment_data
from rmjax.reports.runs.run_directory import read_run

FIRST, LATER = [1.0, 2.0, 4.0, None], [2.0, 3.0, 5.0, 7.0]
NAMED = [{"good": 1.0, "long": 2.0}, {"good": 3.0, "long": 4.0}, None, {"good": 5.0}]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run of five steps of which there is nothing to warn, and one prompt without a reward."""
    steps = [{"reward": 1 + n / 10, "kl": n / 10, "seconds_sampling": float(n)} for n in range(5)]
    held_out = {
        0: prompt_rows(FIRST, lengths=[2, 4, 6, 8], attributes=NAMED),
        2: prompt_rows([*LATER[:3], None], ended=[True, True, True, False]),
        4: prompt_rows(LATER, lengths=[4, 4, 4, 9], attributes=NAMED[::-1]),
    }
    return write_alignment(tmp_path_factory.mktemp("alignment") / "quiet", steps, held_out)


def copied(quiet, tmp_path):
    return shutil.copytree(quiet, tmp_path / "run")


def numbers(run):
    """What `report.json` has, without the seconds that drawing takes."""
    return alignment_data(read_alignment(read_run(run)))


def report(run):
    _, files = report_run(str(run))
    return json.loads(files[2].read_text()), files[1].read_text(), files[0].read_text()


def test_the_numbers_are_those_worked_out_by_hand(quiet, tmp_path):
    found, text, page = report(copied(quiet, tmp_path))
    assert found["format"] == "rmjax.report.alignment/1"
    first, second, last = found["evaluations"]
    assert first["reward"]["mean"] == pytest.approx(7 / 3) and first["reward"]["prompts"] == 3
    assert first["unscored"] == 1 and first["gain"] is None and first["length"] == 5
    assert 1 <= first["reward"]["low"] < 7 / 3 < first["reward"]["high"] <= 4
    assert first["kl"] is None  # no step was made yet
    # Each prompt gains 1, so that is sure, however different the prompts are.
    assert second["gain"] == {"mean": 1, "low": 1, "high": 1, "prompts": 3}
    assert second["ended"] == 0.75 and second["kl"] == 0.1
    assert last["reward"]["mean"] == 4.25 and last["gain"]["prompts"] == 3
    assert first["attributes"] == {"good": 3, "long": 3} == last["attributes"]
    assert second["attributes"] == {}
    summary = found["summary"]
    assert (summary["best_step"], summary["best_reward"]) == (4, 4.25)
    assert (summary["samples"], summary["prompts"]) == (20, 10)
    # 0, 1, 2, 3, 4 without the first
    assert found["seconds"] == {"sampling": 2.5, "scoring": 1, "updating": 1}
    assert found["steps"]["kl"] == [0, 0.1, 0.2, 0.3, 0.4] and found["steps"]["step"][-1] == 5
    assert 'class="strong"><th scope="row" class="r">4</th><td class="r">4.250</td>' in page
    assert "2.50 | 55.6 %" in text.replace("\\", "")
    assert "+1.000" in page and "step 5 of 6 is the last one on record" in page
    assert page.count("question 3") == 1 and page.count("the best of all") == 1


def test_an_interval_is_that_of_the_mean_of_so_many_prompts(tmp_path):
    rewards = np.random.default_rng(0).normal(3, 2, 400)
    rows = prompt_rows(rewards.tolist())
    found = numbers(write_alignment(tmp_path / "run", [], {0: rows}))
    error = 1.96 * rewards.std() / 20
    reward = found["evaluations"][0]["reward"]
    assert reward["low"] == pytest.approx(rewards.mean() - error, abs=0.03)
    assert reward["high"] == pytest.approx(rewards.mean() + error, abs=0.03)


def test_rewards_are_named_and_one_without_weight_is_a_judge(tmp_path):
    rewards = {
        "rewards.brief.function": "mine.py:brief",
        "rewards.brief.weight": 0.2,
        "rewards.judge.server": "http://host/classify",
        "rewards.judge.weight": 0.0,
    }
    run = write_alignment(tmp_path / "run", [{}], {0: prompt_rows(FIRST)}, **rewards)
    found, _, page = report(run)
    for said in ("teacher: reward", "brief: mine.py:brief x 0.2", "/classify x 0"):
        assert said in page.replace("<wbr>", "")
    assert not any("Only the reward that taught" in note for note in found["notes"])


def test_another_judge(quiet, tmp_path):
    run = copied(quiet, tmp_path)
    assert "Only the reward that taught is shown" in numbers(run)["notes"][-1]
    for step, scores in ((0, [1.0, 1.0, 1.0, None]), (4, [0.0, 1.0, 0.5, 1.0])):
        answers = (run / f"rollouts/held-out-{step:06d}.jsonl").read_text()
        rows = [json.loads(line) for line in answers.splitlines()]
        judged = [row | {"scores": [score]} for row, score in zip(rows, scores)]
        write(run / f"rollouts/held-out-{step:06d}.scores-second.jsonl", judged)
    found, text, page = report(run)
    first, _, last = (entry["judges"].get("second") for entry in found["evaluations"])
    assert first["reward"]["mean"] == 1 and first["unscored"] == 1
    assert last["reward"]["mean"] == 0.625 and last["gain"]["mean"] == -0.5
    assert "Only the reward that taught" not in text and "f-judge-0" in page
    # Scores of other answers are not these answers' scores.
    shutil.copy(run / "rollouts/held-out-000004.scores-second.jsonl",
                run / "rollouts/held-out-000002.scores-second.jsonl")  # fmt: skip
    rows[0]["responses"] = ["something else"]
    write(run / "rollouts/held-out-000004.scores-second.jsonl", rows)
    found = numbers(run)
    said = "held-out-000004.scores-second.jsonl is left out: it is of other answers."
    assert said in found["notes"] and not found["evaluations"][2]["judges"]


def test_a_quiet_run_has_little_to_warn_of(quiet):
    notes = numbers(quiet)["notes"]
    assert [note[:30] for note in notes] == [
        "Answers to held-out prompts wi",
        "Only the reward that taught is",
    ]


@pytest.mark.parametrize(
    ("last", "held", "config", "said"),
    [
        ({"kl": 80.0}, {}, {}, "The KL of a sample is 80.0 nats at the end, and above 50"),
        ({"entropy": 0.1}, {}, {}, "The entropy of a token goes from 0.700 to 0.100"),
        ({"without_reward": 3.0}, {}, {}, "Samples without a reward, such as empty ones: 3 of 8."),
        ({"without_advantage": 2.0}, {}, {}, "Prompts without an advantage: 2 of 4."),
        ({}, {"lengths": [9, 9]}, {}, "the length of an answer goes from 4.0 to 9.0 tokens"),
        ({}, {"ended": [True, False]}, {}, "100.0 % at the start, 50.0 % at the end"),
        ({}, {}, {"data.validation": ""}, "There are no held-out prompts (config.data.validation)"),
        ({"loss": None}, {}, {}, "The loss is not finite at step 2"),
    ],
)
def test_what_is_warned_of(last, held, config, said, tmp_path):
    held_out = {0: prompt_rows([1, 2]), 2: prompt_rows([2, 3], **held)}
    run = write_alignment(tmp_path / "run", [{}, last], {} if config else held_out, **config)
    notes = numbers(run)["notes"]
    assert any(said in note for note in notes)
    assert len([note for note in notes if "Only the reward" not in note]) == 1


def test_a_run_that_has_just_begun_and_one_that_was_killed(tmp_path):
    run = write_alignment(tmp_path / "run", [], {})
    assert "has not finished a step" in report(run)[1]
    add_evaluation(run, 0, prompt_rows([1.0, 2.0]))
    add_line(run, {"step": 1, "loss": 0.5, "reward": 1.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    found, text, _ = report(run)
    assert found["steps"]["step"] == [1] and "1 line of metrics.jsonl cannot be read" in text


def test_epochs_are_of_prompts(tmp_path):
    run = write_alignment(tmp_path / "run", [], {}, steps=0, epochs=1.5)
    data = {"samples": {"kept": 20}, "tokens": {"mean": 30.0, "total": 600, "max": 60}}
    (run / "data.json").write_text(json.dumps({"train": {"source": "x", "labels": {}} | data}))
    assert read_run(run).planned == 15  # of 20 prompts, two a step


def test_files_that_are_gone_damaged_or_of_something_else(quiet, tmp_path):
    run = copied(quiet, tmp_path)
    (run / "rollouts/held-out-000002.jsonl").unlink()
    whole = (run / "rollouts/held-out-000004.jsonl").read_text()
    (run / "rollouts/held-out-000004.jsonl").write_text(whole[:-30])
    (run / "rollouts/step-000005.jsonl").write_text('{"prompt": []}\n')
    found, text, _ = report(run)
    assert "held-out-000004.jsonl is damaged and left out (row 4" in text
    assert "step-000005.jsonl is damaged and left out (row 1" in text
    assert "Of 2 of 3 evaluations there are no samples to read" in text and "(step 2, 4)" in text
    last = found["evaluations"][2]
    assert last["reward"] == {"mean": 4.25, "low": None, "high": None, "prompts": None}
    write(run / "rollouts/held-out-000004.jsonl", prompt_rows(LATER, start=1))
    said = "held-out-000004.jsonl: not the prompts of the evaluations before it."
    assert said in numbers(run)["notes"]
    shutil.rmtree(run / "rollouts")
    found = numbers(run)
    assert "Of 3 of 3 evaluations" in found["notes"][0] and len(found["steps"]["step"]) == 5


def test_rewards_that_are_nowhere_are_dashes(tmp_path):
    rows = prompt_rows([None, None], attributes=[None, None])
    run = write_alignment(tmp_path / "run", [{"reward": None}], {0: rows})
    found, _, page = report(run)
    assert (
        found["evaluations"][0]["reward"]["mean"] is None and found["summary"]["best_step"] is None
    )
    assert "Prompt 2" in page


def test_what_is_said_is_shown_as_it_is_and_never_acts(tmp_path):
    long = "word " * 20_000
    rows = prompt_rows([1.0, 2.0], [HOSTILE, long])
    rows[0]["prompt"] = [
        {"role": "system", "content": "be <b>brief</b>"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "seen"},
    ]
    rows[0]["tools"] = [{"name": "look"}, {"name": "listen"}]
    run = write_alignment(tmp_path / "run", [{}], {0: rows})
    _, text, page = report(run)
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "system: be &lt;b&gt;brief&lt;/b&gt;\n\nuser: and?\n\nassistant: tool_calls: [{" in page
    assert "<span>tools <b>2</b></span>" in page and page.count("word ") == 20_000
    assert "\x1b" not in text + page
