"""Files of rows that a kill does not lose: who may write them, and what may continue them."""

import contextlib
import errno
import resource
import shutil

import pytest

from rmjax.data.row_file import check_new, open_row_file
from rmjax.errors import UserError

MADE_BY = {"model": "m"}


def refused(out, made_by, words):
    with pytest.raises(UserError, match=words), open_row_file(out, made_by):
        pass


def test_two_at_once_are_one_too_many(tmp_path):
    out = tmp_path / "out.jsonl"
    with open_row_file(out, MADE_BY) as one:
        one.write([b"1\n"])
        refused(out, MADE_BY, r"out\.jsonl\.partial: another command is writing it")
        one.write([b"2\n"])
    assert out.read_bytes() == b"1\n2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_what_holds_nothing_yet_is_begun_anew(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), open_row_file(out, MADE_BY):
        raise RuntimeError
    with open_row_file(out, {"model": "another"}) as file:
        file.write([b"1\n"])
    assert out.read_bytes() == b"1\n"


def test_what_cannot_be_continued_says_why(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), open_row_file(out, MADE_BY) as file:
        file.write([b"1\n"])
        raise RuntimeError
    refused(out, {"model": "another"}, "begun with other values of model")
    (tmp_path / "out.jsonl.partial.json").unlink()
    refused(out, MADE_BY, r"out\.jsonl\.partial\.json is not there; remove it")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = r"the disk is full while writing .*out\.jsonl\.partial"
    with (
        pytest.raises(UserError, match=words),
        open_row_file(tmp_path / "out.jsonl", MADE_BY) as file,
    ):
        monkeypatch.setattr("os.fsync", full)
        file.write([b"1\n"])


@contextlib.contextmanager
def full_after(size):
    """Files of this process may have so many bytes: as on a full disk, the last write is cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_row_that_does_not_fit_is_cut_off_when_there_is_room(tmp_path):
    """Nothing is written again when the file is closed, which would raise another error."""
    out = tmp_path / "out.jsonl"
    with (
        full_after(25),
        pytest.raises(UserError, match=r"partial: cannot be written .File too large"),
        open_row_file(out, {}) as file,
    ):
        file.write([b"1" * 9 + b"\n", b"2" * 9 + b"\n"])
        file.write([b"3" * 9 + b"\n"])
    assert (tmp_path / "out.jsonl.partial").stat().st_size == 25
    with open_row_file(out, {}) as file:
        assert file.before == 2
        file.write([b"3" * 9 + b"\n"])
    assert out.read_bytes().split() == [b"1" * 9, b"2" * 9, b"3" * 9]


def test_rows_for_a_directory_that_is_gone_are_not_written_into_nothing(tmp_path):
    directory = tmp_path / "there"
    with (
        pytest.raises(UserError, match=r"partial: cannot be written .No such file"),
        open_row_file(directory / "out.jsonl", {}) as file,
    ):
        file.write([b"1\n"])
        shutil.rmtree(directory)
        file.write([b"2\n"])


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file, and no directory to write into"):
        check_new(tmp_path / "file" / "out.jsonl")
    with pytest.raises(UserError, match=r"cannot be written .File name too long"):
        check_new(tmp_path / ("x" * 300))
    check_new(tmp_path / "new" / "out.jsonl")
    assert (tmp_path / "new").is_dir()
