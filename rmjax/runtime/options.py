"""The options of a command, whose parser says what a mistyped one may mean.

A command makes its parser before it imports what it runs, so nothing is imported here that takes
long.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, described by its module, with a better word for mistakes."""

    def __init__(self, command: str = "", description: str | None = None, **others: Any):
        """Takes the command's name and the text of its module; argparse itself the others."""
        if command:
            others |= {"prog": f"python -m rmjax.{command}"}
            others |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description, **others)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parses; an option that is unknown is named before what is missing because of it."""
        words = sys.argv[1:] if args is None else args
        known = re.findall(r"--[a-z][\w-]*", self.format_usage())
        for word in words if known else ():  # a parser of commands has none, and theirs look
            name = word.partition("=")[0]
            if word == "--":
                break
            if name.startswith("--") and not any(o.startswith(name) for o in [*known, "--help"]):
                self.error(f"there is no option {name}{_meant(name, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong, and what may be meant, and ends the program."""
        if found := _CHOICE.search(message):
            message += _meant(found[1], re.findall(r"[^\s,']+", found[2]))
        super().error(message)


def _meant(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
