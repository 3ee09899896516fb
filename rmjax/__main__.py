"""Reward models in JAX, from a laptop to a TPU pod.

    rmjax COMMAND ...

`rmjax COMMAND --help` says what a command takes, with an example. `python -m rmjax.COMMAND` is the
same. Commands, in the order in which they are usually needed:
"""

import ast
import difflib
import importlib.util
import runpy
import sys
from pathlib import Path

from rmjax.errors import UserError, answer_interrupts, exit_with_message

COMMANDS = (
    "train",
    "probe",
    "evaluate",
    "report",
    "convert",
    "extrapolate",
    "score",
    "serve",
    "sample",
    "choose",
    "align",
    "compile-check",
)


def main() -> None:
    """The command."""
    answer_interrupts()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n{listing()}")
        return
    if name == "--version":
        from rmjax import __version__

        print(f"rmjax {__version__}")
        return
    exit_with_message(lambda: check_command(name))
    sys.argv = [f"rmjax {name}", *rest]
    runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)


def check_command(name: str) -> None:
    """Raises a `UserError` unless `name` is a command's."""
    if name in COMMANDS:
        return
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"rmjax has no command {name!r}{meant} It has {', '.join(COMMANDS)}")


def module_of(command: str) -> str:
    """The module that is run."""
    return f"rmjax.{command.replace('-', '_')}"


def listing() -> str:
    """A line for each command: the first of its module's docstring, which is not imported."""
    lines = []
    for command in COMMANDS:
        spec = importlib.util.find_spec(module_of(command))
        assert spec is not None and spec.origin is not None
        said = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
        lines.append(f"  {command:<14} {(said or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
