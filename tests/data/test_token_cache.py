import json
import os

import numpy as np
import pytest

from rmjax.data.token_cache import with_checksum
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.runtime import cache

TOKENIZER = byte_tokenizer()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the tokens of a small file, and returns where the cache has them."""
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{n // 2}", "response": "x" * (1 + n), "a": n % 5} for n in range(6)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load():
        load_tokenized(
            str(path),
            "train",
            TOKENIZER,
            attributes=("a",),
            label_range=(0.0, 4.0),
            max_length=100,
            over_long="drop",
        )
        (entry,) = (tmp_path / "cache" / "tokens").glob("*[!l]")
        return entry

    return load


def save(name, change):
    return lambda entry: np.save(entry / f"{name}.npy", change(np.load(entry / f"{name}.npy")))


def sign(entry):
    """As whoever damages it on purpose would."""
    file = entry / "summary.json"
    file.write_text(json.dumps(with_checksum(entry, json.loads(file.read_text()))))


def link(entry):
    (entry / "rows.npy").rename(entry.parent.parent / "rows.npy")
    (entry / "rows.npy").symlink_to(entry.parent.parent / "rows.npy")


@pytest.mark.parametrize(
    "spoil",
    (
        save("offsets", lambda a: a + 1),
        save("offsets", lambda a: a[::-1].copy()),
        save("prompt_ids", lambda a: a - 1),
        save("shared", lambda a: a + 1000),
        save("labels", lambda a: a + np.inf),
        save("rows", lambda a: a.astype(np.int64)),
        save("chosen", lambda a: ~a),
        save("tokens", lambda a: a[:-1]),
        lambda entry: (entry / "rows.npy").unlink(),
        lambda entry: (entry / "summary.json").write_text('{"counts": {"a": "b"}, "notes": []}'),
        link,
    ),
)
def test_a_cache_that_somebody_else_wrote_is_refused(load, spoil):
    entry = load()
    spoil(entry)
    sign(entry)
    with pytest.raises(UserError, match=r"summary\.json|not what this program keeps there"):
        load()


@pytest.mark.parametrize("name", ("rows.npy", "summary.json"))
@pytest.mark.parametrize("content", (b"", b"[" * 100_000))
def test_what_is_cut_short_is_made_again(load, name, content):
    whole = (load() / name).read_bytes()
    (load() / name).write_bytes(content)
    with pytest.warns(match="damaged.* it is made again"):
        assert (load() / name).read_bytes() == whole


@pytest.mark.parametrize("name", ("tokens.npy", "labels.npy", "summary.json"))
def test_a_flipped_bit_is_found(load, name):
    whole = (load() / name).read_bytes()
    at = whole.index(b'"kept": 6') + 8 if name == "summary.json" else len(whole) - 3
    (load() / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.warns(match="damaged.* it is made again"):
        assert (load() / name).read_bytes() == whole


def test_what_killed_runs_left_is_removed_when_it_is_old(load, tmp_path):
    cache = tmp_path / "cache" / "tokens"
    cache.mkdir(parents=True, mode=0o700)
    (cache.parent).chmod(0o700)
    for name, days in (("key.abcdefg_", 2), ("key.01234567", 0), ("other", 2)):
        left = cache / f"{name}.partial"
        left.mkdir()
        (left / "tokens.npy").touch()
        then = left.stat().st_mtime - days * 86400 - 1
        for path in (left / "tokens.npy", left):
            os.utime(path, (then, then))
    with pytest.warns(match="1 half-written files or directories of killed runs are removed"):
        load()
    assert {path.name for path in cache.glob("*.partial")} == {
        "key.01234567.partial",  # another process may be writing it
        "other.partial",  # no name of ours
    }


def test_a_cache_that_anybody_may_write_to_is_refused(load):
    entry = load()
    assert cache.programs_fault(entry.parent) == ""
    entry.parent.chmod(0o770)
    assert "can be written by others (mode 770)" in cache.programs_fault(entry.parent)
    load()  # data of a group may be shared
    entry.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"tokens can be written by others .* set RMJAX_CACHE"):
        load()


def test_what_is_tokenized_in_portions_is_the_same(load, monkeypatch, tmp_path):
    entry = load()
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    monkeypatch.setattr("rmjax.data.token_stream._CONVERSATIONS", 1)
    monkeypatch.setenv("RMJAX_CACHE", str(tmp_path / "other"))
    load()
    (other,) = (tmp_path / "other" / "tokens").iterdir()
    assert whole == {file.name: file.read_bytes() for file in other.iterdir()}


def test_a_name_that_no_file_can_have_is_told_in_a_line():
    from rmjax.training.config_file import load_config

    with pytest.raises(UserError, match="cannot be looked at"):
        load_config("a" * 5000)
