"""Small files: read or replaced whole, added to, and locked."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from pathlib import Path
from typing import IO, Any

from rmjax.errors import UserError, shortened
from rmjax.runtime.json_object import unique_keys

_MOST_BYTES = 64 << 20  # of a JSON object that is read whole
# Whatever reading JSON raises that has other fields, types or numbers than were expected.
BAD_JSON = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
PARTIAL = ".partial"  # the suffix of a file that is not whole yet
# Of a name by which no other program continues it, as one continues `DST.partial`.
_HALF_WRITTEN = re.compile(rf"\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}$")
_ABANDONED_SECONDS = 24 * 3600.0


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; anything else is a `UserError` that names the file."""
    try:
        check_readable(path, _MOST_BYTES)
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({shortened(str(error), 300)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_readable(path: Path, most_bytes: int) -> None:
    """Raises a `UserError` if reading a whole file would not end, or fill the memory.

    A directory from elsewhere may have a pipe or a link to a device under any name.

    Raises:
      FileNotFoundError: there is no such file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: neither a file nor a directory, and is not read")
    if found.st_size > most_bytes:
        raise UserError(
            f"{path}: {found.st_size:,} bytes, more than such a file has (at most {most_bytes:,})"
        )


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a full disk, a kill or a power cut leaves the old one.

    Several processes may write the same file, on several hosts too: the last one wins.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(partial, "wb", buffering=0) as file:
            append(file, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(directory: Path) -> None:
    """Removes what killed programs left half written in a directory; a warning says how much.

    These are the files of `replace_file`, and directories that are named likewise. Somebody, on
    another host too, may be writing such a one: so what was written to within a day stays.
    """
    count = 0
    for path in directory.glob(f"*{PARTIAL}"):
        if not _HALF_WRITTEN.search(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # somebody else was first
            written = max(part.stat().st_mtime for part in (path, *path.glob("*")))
            if time.time() - written > _ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                count += 1
    if count:
        what = f"{count:,} half-written files or directories of killed runs are removed"
        warnings.warn(f"{directory}: {what}", stacklevel=2)


def append(file: IO[bytes], content: bytes | memoryview, *, sync: bool = True) -> None:
    """Adds to a file that is open without a buffer.

    A full disk leaves the beginning of `content`. With a buffer the rest would be written once more
    when the file is closed, and the error raised there again.

    Args:
      file: opened with `buffering=0`.
      content: what is added.
      sync: whether to wait until it is on the disk.

    Raises:
      FileNotFoundError: the file was removed, so that nobody could read what is added.
    """
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
    if sync:
        os.fsync(file.fileno())
    if not os.fstat(file.fileno()).st_nlink:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file.name)


def lock_file(file: IO[Any], *, wait: bool = False) -> bool:
    """Locks an open file until it is closed; False if another process has locked it.

    Some file systems cannot lock, or not between machines. There the answer is always True.

    Args:
      file: the file.
      wait: whether to wait for another process.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the file system does not lock
        pass
    return True
