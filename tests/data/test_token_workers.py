"""Tokens that other processes make: the same, in the same order, and none of them is left."""

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from helpers.paths import ROOT
from rmjax.data import token_stream, token_workers
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.conversation import Conversation
from rmjax.data.portion import PortionEncoder
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError

COUNT = 2000


@pytest.fixture
def begun(monkeypatch):
    """The processes that help, which do so from the first portion on."""
    processes = []

    def begin(begin=token_workers._begin):
        processes.append(begin())
        return processes[-1]

    monkeypatch.setattr(token_workers, "_begin", begin)
    monkeypatch.setattr(token_workers, "_cores", lambda: 2)
    monkeypatch.setattr(token_stream, "_FEW", 1)
    monkeypatch.setattr(token_stream, "_CONVERSATIONS", 64)
    yield processes
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


def write(path, count=COUNT, **at):
    rows = [
        {"prompt": f"p {i // 2}", "response": "r" * (i % 50), "a": i % 5, "name": "n"}
        | at.get(f"row_{i + 1}", {})
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, tmp_path, monkeypatch, cache, **changes):
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / cache))
    options: dict[str, Any] = dict(
        attributes=("a",), label_range=(0.0, 4.0), max_length=45, over_long="drop"
    )
    tokenizer = changes.pop("tokenizer", None) or byte_tokenizer()
    load_tokenized(source, "train", tokenizer, **(options | changes))
    (entry,) = (tmp_path / cache / "tokens").iterdir()
    return {file.name: file.read_bytes() for file in entry.iterdir()}


@pytest.mark.parametrize("policy", (False, True))
def test_the_cache_is_the_same_bit_for_bit(policy, begun, tmp_path, monkeypatch):
    source = write(tmp_path / "x.jsonl")
    changes = {"policy": policy, "attributes": () if policy else ("a",)}
    helped = load(source, tmp_path, monkeypatch, "helped", **changes)
    assert len(begun) == 2
    monkeypatch.setattr(token_stream, "_FEW", COUNT + 1)
    assert load(source, tmp_path, monkeypatch, "alone", **changes) == helped
    assert b"dropped: an empty response" in helped["summary.json"]


def test_the_first_error_is_told_with_its_row(begun, tmp_path, monkeypatch):
    """One finds it here, where rows are read, the others elsewhere; the first row's is told."""
    refusing = byte_tokenizer()
    refusing.chat_template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    source = write(
        tmp_path / "x.jsonl",
        row_900={"response": "bad"},
        row_1500={"response": "bad"},
        row_950={"a": 7},
    )
    with pytest.raises(UserError, match=r"x\.jsonl row 900: the chat template refuses .*no"):
        load(source, tmp_path, monkeypatch, "cache", tokenizer=refusing)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_process_that_is_killed_ends_in_one_line(begun, tmp_path, monkeypatch):
    source = write(tmp_path / "x.jsonl")
    encode = PortionEncoder.__call__

    def kill(self, entries):
        """Of the first portion, which is made here."""
        found = encode(self, entries)
        monkeypatch.setattr(token_workers.Workers, "submit", killing)
        return found

    def killing(self, entries, submit=token_workers.Workers.submit):
        begun[0].kill()
        return submit(self, entries)

    monkeypatch.setattr(PortionEncoder, "__call__", kill)
    with pytest.raises(UserError, match=r"a process that makes tokens was ended \(status -9, as "):
        load(source, tmp_path, monkeypatch, "cache")


_SCRIPT = """
import os, time
from rmjax.data import token_workers
from rmjax.data.chat_encoder import ChatEncoder
from rmjax.data.portion import PortionEncoder
from rmjax.data.tokenizer import byte_tokenizer

print("made", flush=True)
token_workers._cores = lambda: 2
with token_workers.begun_workers(PortionEncoder(ChatEncoder(byte_tokenizer()), False, False)) as w:
    w.submit([]).result()
    print(*(w._free.get()[0].pid for _ in range(2)), flush=True)
    time.sleep(60)
"""


def test_whoever_is_killed_leaves_none_behind(tmp_path):
    """Nor is a script imported again that is not made for that."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout and process.stdout.readline() == "made\n"
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(map(_runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_what_a_template_shows_is_the_same_for_all(monkeypatch):
    """It is tried with the first message of a kind, whichever process has that."""
    monkeypatch.setattr(token_workers, "_cores", lambda: 2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.name == 'a' %}a{% endif %}{% endfor %}"
    )
    encode = PortionEncoder(ChatEncoder(tokenizer), policy=False, every_turn=False)
    with token_workers.begun_workers(encode) as workers:
        assert workers
        asked = []
        for name in "abbbb":
            messages: Any = [{"role": "user", "content": "x", "name": name}]
            messages += [{"role": "assistant", "content": "y"}]
            asked.append(workers.submit([((Conversation(messages), "x"),)]))
        for each in asked:
            workers.tokens(each)
    assert not encode.encoder.unread


def test_what_cannot_be_sent_is_made_here(monkeypatch):
    monkeypatch.setattr(token_workers, "_cores", lambda: 2)
    tokenizer = byte_tokenizer()
    tokenizer.hook = lambda: None
    encode = PortionEncoder(ChatEncoder(tokenizer), policy=False, every_turn=False)
    with token_workers.begun_workers(encode) as workers:
        assert workers is None
