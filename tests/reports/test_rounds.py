"""The page that compares rounds: its numbers by hand, and what it refuses."""

import json

import numpy as np
import pytest

from helpers.reports import write_lines
from rmjax.errors import UserError
from rmjax.report import report_rounds


def answers(*texts, ended=True, log_probability=-2.0):
    return [
        {
            "prompt": [{"role": "user", "content": f"question {number}"}],
            "responses": [text],
            "ended": [ended],
            "log_probabilities": [[log_probability / 2] * 2],
        }
        for number, text in enumerate(texts)
    ]


def scored(rows, values, names=("help", "verb")):
    return [
        row | {"scores": [value], "attributes": [value and {names[0]: value, names[1]: -value}]}
        for row, value in zip(rows, values, strict=True)
    ]


def write_round(directory, rows, **scores):
    directory.mkdir()
    write_lines(directory / "answers.jsonl", rows)
    for name, values in scores.items():
        write_lines(directory / f"scores-{name}.jsonl", scored(rows, values))
    return str(directory)


@pytest.fixture
def rounds(tmp_path):
    """Two rounds of four prompts; the second round's last answer is empty."""
    first = answers("one", "two words", "a b c", "x")
    second = answers("one more word", "two", "a b c", "", ended=False, log_probability=-1.0)
    return [
        write_round(tmp_path / "start", first, reward=[1, 2, 3, 4], start=[-2] * 4),
        write_round(tmp_path / "next", second, reward=[2, 1, 3, None], start=[-4, -3, -1, None]),
    ]


def test_the_numbers_are_those_worked_out_by_hand(rounds, tmp_path):
    _, files = report_rounds(rounds, str(tmp_path / "out"))
    assert sorted(f.name for f in files) == ["report.html", "report.json", "report.md"]
    start, then = json.loads((tmp_path / "out" / "report.json").read_text())["rounds"]
    assert start["judges"]["reward"]["mean"] == 2.5 and start["words"]["mean"] == 7 / 4
    judge = then["judges"]["reward"]
    assert judge["mean"] == 2 and judge["unscored"] == 1 and judge["gain"]["prompts"] == 3
    assert judge["gain"]["mean"] == 0 and judge["win_rate"]["mean"] == 0.5  # +1, -1, the same
    assert judge["attributes"]["verb"]["mean"] == -2
    assert then["words"]["mean"] == 7 / 4 and then["ended"] == 0
    assert start["log_ratio"]["mean"] == 0
    np.testing.assert_allclose(then["log_ratio"]["mean"], (3 + 2 + 0) / 3)  # own less the start's
    page = (tmp_path / "out" / "report.md").read_text()
    assert "1 answers have no score by reward" in page and "question 3" in page
    assert "The only judge is the model that taught" in page


def test_a_prompt_that_several_rows_have_counts_once(tmp_path):
    rows = answers("one", "two words", "a b c")
    rows[2]["prompt"] = rows[0]["prompt"]
    names = [
        write_round(tmp_path / name, rows, reward=values)
        for name, values in (("start", [1, 5, 3]), ("next", [3, 5, 4]))
    ]
    report_rounds(names, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    start, then = found["rounds"]
    assert found["prompts"] == 2 and start["answers"] == 3
    assert start["judges"]["reward"]["mean"] == ((1 + 3) / 2 + 5) / 2
    assert then["judges"]["reward"]["gain"]["mean"] == (1.5 + 0) / 2


def test_what_does_not_belong_together_is_refused(rounds, tmp_path):
    other = write_round(tmp_path / "other", answers("a", "b"), reward=[1, 2])
    with pytest.raises(UserError, match="other: 2 prompts, of which 2 are among the 4 of start"):
        report_rounds([rounds[0], other], str(tmp_path / "out"))
    write_lines(tmp_path / "other" / "scores-reward.jsonl", scored(answers("a", "z"), [1, 2]))
    with pytest.raises(UserError, match=r"not scores of the answers\.jsonl beside it"):
        report_rounds([other], str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"there is no answers\.jsonl in it"):
        report_rounds([str(tmp_path)], str(tmp_path / "out"))
