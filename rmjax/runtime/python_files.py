"""Python files that a user gives: config files, and functions that reward."""

import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from rmjax.errors import UserError, shortened


def load_python_file(path: Path, what: str) -> ModuleType:
    """Executes a file and returns its module, whose name no other file's module has.

    Args:
      path: the file.
      what: the option or field that names it, for messages.

    Raises:
      UserError: it is no Python file, or it raises; with the line.
    """
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"rmjax_file_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {path} is no Python file, whose name ends with .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # as dataclasses need it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise as_user_error(error, f"{what}: loading {path}", path) from error
    return module


def as_user_error(error: BaseException, what: str, path: Path) -> UserError:
    """What was raised and where, in one line; a `UserError` as it is.

    The line is the last one of the user's file that took part; without any, that which raised.
    """
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
    file, line = (own or frames)[-1].filename, (own or frames)[-1].lineno
    said = str(error)
    if isinstance(error, SyntaxError) and error.filename:  # no frame: nothing was executed
        file, line, said = error.filename, error.lineno, error.msg
    return UserError(
        f"{what} raised {type(error).__name__}: {shortened(said, 300)} ({file} line {line})"
    )
