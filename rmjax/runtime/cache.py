"""The cache on disk: `$RMJAX_CACHE`, else `~/.cache/rmjax`.

What is in it can be deleted at any time: it is computed again. What it holds becomes training data
and compiled programs, and looks the same whoever wrote it. So it is a directory of our own, or none
that just anybody may write to.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rmjax.errors import UserError, disk_errors

_OTHERS, _ANY_BUT_US = stat.S_IWOTH, stat.S_IWOTH | stat.S_IWGRP


def cache_root() -> Path:
    """The cache's directory, which need not exist yet."""
    return Path(os.environ.get("RMJAX_CACHE", "~/.cache/rmjax")).expanduser()


def cache_directory(what: str) -> Path:
    """The directory of one kind of what is cached, made if it is not there, for us alone.

    Raises:
      UserError: it cannot be written, or it is somebody else's, or anybody may write to it.
    """
    directory = cache_root() / what
    with cache_errors():
        cache_root().parent.mkdir(parents=True, exist_ok=True)
        for path in (cache_root(), directory):
            path.mkdir(mode=0o700, exist_ok=True)
    if fault := _fault(directory, _OTHERS, {0, os.geteuid()} if os.geteuid() else set()):
        raise UserError(
            f"{fault}, so what is cached there may be anybody's: make it your own, or set "
            "RMJAX_CACHE to a directory that is"
        )
    return directory


def programs_fault(directory: Path) -> str:
    """Why what is in a directory is not run as programs, in words; empty if it may be.

    That takes more: nobody else may write to it, not even a group that shares its data.
    """
    return _fault(directory, _ANY_BUT_US, {0, os.geteuid()})


def _fault(directory: Path, writers: int, owners: set[int]) -> str:
    """What is wrong with a directory of the cache, or with the cache itself.

    Args:
      directory: in the cache.
      writers: permissions that they must not have.
      owners: whom they may belong to; empty for anybody, as for a container's root.
    """
    for path in (cache_root(), directory):
        if path == directory and path.is_symlink():
            return f"{path} is a link"
        found = path.stat()
        if owners and found.st_uid not in owners:
            return f"{path} belongs to user {found.st_uid}"
        if found.st_mode & writers:
            return f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Turns what can go wrong while the cache is written into a `UserError`."""
    root = cache_root()
    try:
        with disk_errors(f"the cache in {root}"):
            yield
    except OSError as error:
        raise UserError(
            f"the cache in {root} cannot be written ({error}): set RMJAX_CACHE to a directory "
            "that can"
        ) from error
