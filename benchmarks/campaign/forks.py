"""Commands in forked processes, watched: how they end, what they say, how much memory they take.

A fork of a process that has imported rmjax begins at once, where an interpreter and its imports
take seconds. So the process that forks must not have opened a device, nor have begun threads.
"""

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rmjax.data import template_trial

_LOOK = 0.01  # seconds between two looks at a process
_PAGE = os.sysconf("SC_PAGE_SIZE")
# What a file must never make the program do; Python raises an audit event before each.
_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")

_TRIAL = [sys.executable, "-I", template_trial.__file__]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      code: its exit code; negative for a signal, None if it was stopped at a limit.
      text: standard output and error.
      seconds: how long it took.
      peak: most resident bytes that were seen.
      limit: which limit it was stopped at, if any.
    """

    code: int | None
    text: str
    seconds: float
    peak: int
    limit: str = ""


def run(
    arguments: Sequence[str],
    directory: Path,
    *,
    seconds: float = 600.0,
    most_bytes: int = 1 << 62,
    forbidden: Path | None = None,
    when: Callable[[int, float], bool] | None = None,
    prepare: Callable[[], None] | None = None,
    log: Path | None = None,
) -> Ended:
    """Runs `python -m rmjax.ARGUMENTS` in a fork and waits for its end.

    Args:
      arguments: a command and its own arguments.
      directory: where it runs, and where its output is kept.
      seconds: it is killed after so long.
      most_bytes: it is killed when it holds so much memory.
      forbidden: a path under which it may open nothing.
      when: called with the process and its seconds at every look; it is done when it says True.
      prepare: called in the fork before the command.
      log: where its output is kept; in the directory if not given.
    """
    log = log or directory / "output.txt"
    process = start(arguments, directory, log, forbidden, prepare)
    began, peak, limit, done = time.monotonic(), 0, "", when is None
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        now = time.monotonic() - began
        if ended:
            break
        with contextlib.suppress(OSError):
            held = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
            peak = max(peak, held)
        if not limit and (now > seconds or peak > most_bytes):
            limit = f"{seconds:g} s" if now > seconds else f"{most_bytes >> 20} MiB"
            os.kill(process, signal.SIGKILL)
        if not done and when is not None:
            done = when(process, now)
        time.sleep(_LOOK)
    code = None if limit else os.waitstatus_to_exitcode(status)
    text = log.read_bytes().decode(errors="replace")
    return Ended(code, text, now, max(peak, usage.ru_maxrss << 10), limit)


def start(
    arguments: Sequence[str],
    directory: Path,
    log: Path,
    forbidden: Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Begins a command; see `run`. Returns its process, which the caller waits for."""
    log.write_bytes(b"")  # here, since the command may be killed before it begins
    process = os.fork()
    if not process:
        _become(arguments, directory, log, forbidden, prepare)
    return process


def call(function: Callable[[Path], dict[str, str]], argument: Path) -> dict[str, str]:
    """What a function returns, called in a fork: libraries that it loads may begin threads."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            with open(writing, "w") as pipe:
                json.dump(function(argument), pipe)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return json.loads(text) if text else {"nothing": "to be read"}


def _become(
    arguments: Sequence[str],
    directory: Path,
    log: Path,
    forbidden: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    """In the new process: is what `python -m rmjax.ARGUMENTS` would be."""
    code = 70
    try:
        file = os.open(log, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.chdir(directory)
        os.setpgid(0, 0)
        if forbidden is not None:
            _forbid(forbidden)
        if prepare is not None:
            prepare()
        name, *rest = arguments
        module = f"rmjax.{name.replace('-', '_')}"
        sys.argv = [name, *rest]
        sys.modules.pop(module, None)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 71
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _forbid(forbidden: Path) -> None:
    """Ends this process, loudly, if it opens what lies under a path, or begins a program."""
    inside = str(forbidden)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            found = os.path.realpath(arguments[0])
            if found.startswith(inside):
                os.write(2, f"FORBIDDEN: opened {found}\n".encode())
                os._exit(99)
        elif event == "subprocess.Popen" and arguments[1] == _TRIAL:
            return  # our own: it runs a chat template, with limits
        elif event in _CODE:
            os.write(2, f"FORBIDDEN: {event} {arguments!r}\n".encode()[:300])
            os._exit(99)

    sys.addaudithook(watch)
