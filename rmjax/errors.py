"""Errors that a user can fix: one message, no traceback; and what messages have in common."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
# What a file system refuses, whoever asks: access, a name, a size; or it is not there any more.
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EFBIG, errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENODEV),
)
# Those that libraries wrap into errors of their own, which have the system's words in them.
_WORDS = tuple(
    os.strerror(number)
    for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ESTALE, errno.EIO)
)
_LONGEST = 2000  # characters of a message; a file may have made it longer
_FULL_DISK_SIGNS = ("No space left on device", "RESOURCE_EXHAUSTED", "Disk quota exceeded")


class UserError(Exception):
    """A problem outside the code: the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk, from whichever library it comes, into a `UserError` about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full(error):
            raise UserError(
                f"the disk is full while writing {what}: free some room and run the command again"
            ) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether a disk is full, or what somebody may have of it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(sign in str(error) for sign in _FULL_DISK_SIGNS)


@contextlib.contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Likewise, and whatever else a file system refuses: access, a name, a size.

    A directory that is not there any more, or that was made read-only, is of this kind.
    """
    with disk_errors(what):
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            where = f": {error.filename}" if str(error.filename or what) not in what else ""
            raise UserError(f"{what}: cannot be written ({error.strerror}{where})") from error
        except Exception as error:
            words = [word for word in _WORDS if word in str(error)]
            if not words:
                raise
            raise UserError(f"{what}: cannot be written ({words[0]})") from error


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, each with both values; None stands for a field that is not there."""
    values = {name: (one.get(name), other.get(name)) for name in {**one, **other}}
    return {name: (first, second) for name, (first, second) in values.items() if first != second}


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a message: all of a few; of many the first, and how many more there are."""
    names = [*names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shortened, names[:most])) + more


def shortened(text: str, most: int = 60) -> str:
    """A text on one line, and of one that is too long for a message the beginning.

    Characters that a terminal would obey, or that change the direction of what follows, are shown
    as Python writes them.
    """
    text = _escaped(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown(message: object) -> str:
    """A message as a terminal may show it, whatever the files that it speaks of have in them.

    What a terminal would obey, and what changes the direction of text, is written as Python writes
    it; lines stay lines. Of a message that is too long for anyone to read the middle is left out,
    and it says so.
    """
    text = _escaped(str(message))
    half = _LONGEST // 2
    left_out = len(text) - 2 * half
    if left_out <= 0:
        return text
    return f"{text[:half]} [{left_out:,} characters left out] {text[-half:]}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def exit_with_message(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError` becomes one line on stderr and exit status 1.

    Where nobody reads the output any more, as behind `| head`, the command ends without a word. A
    file that takes no more of it is named like any other.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno in _NAMES and isinstance(error.filename, str):
            print(f"error: {shown(error.filename)}: {error.strerror}", file=sys.stderr)
            sys.exit(1)
        if not is_full(error):
            raise
        _drop_output()
        where = error.filename or "standard output"
        print(f"error: the disk is full while writing {shown(where)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(130)


def answer_interrupts() -> None:
    """Makes Ctrl-C one line and exit status 130 where `exit_with_message` does not run yet.

    A command calls it before its imports, which take a second. Python is not taken down in order,
    because a native library that is half imported may crash then. `--help`, too, is printed where
    `exit_with_message` does not run: nobody may be there to read all of it.
    """

    def report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, BrokenPipeError):
            return _drop_output()
        if not isinstance(error, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, traceback)
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)

    def repeat(unraisable: Any) -> None:
        # Ctrl-C in a finalizer or a callback, where Python would write a traceback and go on.
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return sys.__unraisablehook__(unraisable)
        main = threading.main_thread().ident or 0
        # A moment later, since what is raised in here is dropped as well.
        again = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.excepthook, sys.unraisablehook = report, repeat
    atexit.register(_flush_output)


def end_when_interrupted() -> None:
    """Makes Ctrl-C end the program wherever it is, for a command that has nothing to finish.

    Python raises `KeyboardInterrupt` in the main thread alone, when it next runs Python: that of a
    compiler may be minutes later. So a thread answers here.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # as of a command in the background, which is told to ignore it
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def answer() -> None:
        os.read(reading, 1)
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(writing)
    threading.Thread(target=answer, daemon=True).start()


def _flush_output() -> None:
    """Writes what is left, as Python does at its end, where it would complain of a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Has nothing more come of standard output, which nobody reads any more."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
