import errno
import os
import stat

import pytest

from rmjax.errors import UserError
from rmjax.runtime import files
from rmjax.runtime.cache import cache_errors, cache_root
from rmjax.runtime.files import lock_file, replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    replace_file(path, b"old")

    def half(file, content):
        file.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", half)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"newer")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]  # nothing is left over
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_replaced_file_has_the_permissions_of_any_other(tmp_path):
    replace_file(tmp_path / "replaced", b"")
    (tmp_path / "other").write_bytes(b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_file_is_locked_once_until_it_is_closed(tmp_path):
    with open(tmp_path / "lock", "a") as one, open(tmp_path / "lock", "a") as other:
        assert lock_file(one)
        assert not lock_file(other)  # another open file is as another process
        one.close()
        assert lock_file(other)


def test_the_cache_is_where_the_user_says_else_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RMJAX_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("RMJAX_CACHE")
    assert cache_root() == tmp_path / ".cache" / "rmjax"


def test_a_cache_that_cannot_be_written_is_one_message(monkeypatch):
    monkeypatch.setenv("RMJAX_CACHE", "/dev/null")
    message = r"/dev/null cannot be written .*: set RMJAX_CACHE"
    with pytest.raises(UserError, match=message), cache_errors():
        (cache_root() / "tokens").mkdir()
