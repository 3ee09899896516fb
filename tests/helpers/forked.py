"""Python processes that need not be started: each is forked from one that has imported rmjax.

They behave as `python ARGUMENTS` does, but begin at once, where an interpreter and its imports take
seconds. What differs: the modules are in memory, so that an import tells nothing, nor does the
memory that the process holds.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import jax

from helpers.paths import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.preloaded"])


def start(
    arguments: Sequence[object],
    *,
    out: Path,
    err: Path,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> ForkServerProcess:
    """Starts `python ARGUMENTS`, which are `-m MODULE ...` or `-c PROGRAM ...`.

    Args:
      arguments: of Python.
      out: the file for standard output.
      err: the file for standard error; may be the same.
      environment: what it has beside this process's own.
      cwd: where it starts.
    """
    variables = {**os.environ, **(environment or {})}
    task = (list(map(str, arguments)), out, err, variables, cwd)
    process = _CONTEXT.Process(target=_run, args=task, daemon=True)
    process.start()
    return process


def run(
    arguments: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`start`, and waits for the end."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        process = start(arguments, out=out, err=err, environment=environment, cwd=cwd)
        code = wait(process, timeout)
        return subprocess.CompletedProcess(
            list(map(str, arguments)), code, out.read_text(), err.read_text()
        )


def wait(process: ForkServerProcess, timeout: float = 300) -> int:
    """Its exit code; it is killed where it takes longer."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(process.name, timeout)
    return process.exitcode


def _run(arguments: list[str], out: Path, err: Path, variables: dict[str, str], cwd: Path) -> None:
    """In the new process: becomes what `python ARGUMENTS` would be."""
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = io.TextIOWrapper(open(1, "wb", 0), write_through=True)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0), write_through=True)  # noqa: SIM115
    os.chdir(cwd)
    _set_environment(variables)
    (kind, what), sys.argv = arguments[:2], arguments[1:]
    code = 0
    try:
        if kind == "-m":
            sys.modules.pop(what, None)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c", kind
            sys.argv[0] = "-c"
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def _set_environment(variables: dict[str, str]) -> None:
    """Sets them, and JAX's settings, which it read from them when it was imported."""
    names = {*os.environ, *variables}
    changed = [name for name in names if os.environ.get(name) != variables.get(name)]
    os.environ.clear()
    os.environ.update(variables)
    for name in changed:
        if name.startswith("JAX_") and name.lower() in jax.config.values:
            now, value = jax.config.values[name.lower()], variables.get(name)
            if value is not None and isinstance(now, bool):
                value = value.lower() in ("1", "true")
            elif value is not None and isinstance(now, int | float):
                value = type(now)(value)
            jax.config.update(name.lower(), value)
