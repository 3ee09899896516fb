"""A report that is written again while its run goes on."""

import dataclasses
import json

import numpy as np
import pytest

import rmjax.report
from helpers.reports import write_alignment
from rmjax.errors import UserError
from rmjax.report import watch_run
from rmjax.reports.runs import run_directory
from rmjax.reports.runs.run_directory import read_run

REFRESH = '<meta http-equiv="refresh" content="3">'


@pytest.fixture(params=["align", "train"])
def run(request, tmp_path):
    """A run that has no step yet, whose page is drawn in no time."""
    found = write_alignment(tmp_path / "run", [], {})
    if request.param == "train":
        record = json.loads((found / "config.json").read_text())
        del record["config"]["rollout.n"]
        (found / "config.json").write_text(json.dumps(record))
    return found


def watched(run, monkeypatch, *pauses):
    """The page at each pause and at the end. At a pause something happens; after all the run ends.

    A pause gives whether the run goes on.
    """
    page, seen, left, going_on = run / "report" / "report.html", [], [*pauses], [True]

    def sleep(seconds):
        assert seconds == 3
        seen.append((page.stat().st_ino, page.stat().st_mtime_ns, page.read_text()))
        going_on[0] = left.pop(0)()

    monkeypatch.setattr(rmjax.report, "sleep", sleep)
    monkeypatch.setattr(run_directory, "_is_locked", lambda lock: going_on[0])
    document, files = watch_run(str(run), seconds=3)
    assert not left and files[0] == page and document.refresh == 0
    return seen, page.read_text()


def test_the_page_follows_the_run_to_its_end(run, monkeypatch, capsys):
    def writes():
        tokens = {"mean": 2.0, "max": 3, "total": 8}
        train = {"source": "new.jsonl", "samples": {"kept": 4}, "tokens": tokens, "labels": {}}
        (run / "data.json").write_text(json.dumps({"train": train}))
        return True

    seen, last = watched(run, monkeypatch, lambda: True, writes, lambda: False)
    first, same, second = seen
    assert first == same and first != second  # it is not written where nothing changed
    assert REFRESH in first[2] and REFRESH in second[2] and 'http-equiv="refresh' not in last
    assert "new.jsonl" not in first[2] and "new.jsonl" in second[2]
    assert "Going on: step 0 of 6" in second[2] and "Not running" in last
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_ctrl_c_leaves_a_page_that_does_not_load_again(run, monkeypatch):
    def pressed():
        raise KeyboardInterrupt

    seen, last = watched(run, monkeypatch, pressed)
    assert REFRESH in seen[0][2] and 'http-equiv="refresh' not in last and "Going on" in last


def test_a_run_of_which_nobody_knows_ends_with_its_steps(run, monkeypatch):
    monkeypatch.setattr(run_directory, "_is_locked", lambda lock: None)
    found = read_run(run)
    assert not found.is_over
    nan = {name: np.full(6, np.nan) for name in found.numbers}
    assert dataclasses.replace(found, steps=range(1, 7), numbers=nan).is_over


def test_a_line_that_is_just_being_written_is_not_counted(run, monkeypatch):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    for going_on, unread in ((True, 0), (None, 1), (False, 1)):
        monkeypatch.setattr(run_directory, "_is_locked", lambda lock, is_=going_on: is_)
        found = read_run(run)
        assert (list(found.steps), found.unread) == ([1], unread)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["run", "--watch=0.5"], "--watch=0.5: expected seconds"), (["--data=x", "--watch"], "goes")],
)
def test_what_cannot_be_watched_is_refused(options, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", *options])
    with pytest.raises(UserError, match=said):
        rmjax.report._main()
