"""The one word `rmjax`, in a process of its own as users have it."""

import subprocess
import sys
from pathlib import Path

import pytest

import rmjax
from helpers.paths import ROOT
from rmjax.__main__ import COMMANDS, listing, module_of


def said(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rmjax", *words], capture_output=True, text=True)


def test_the_table_has_every_command():
    """That is every module of the top floor that runs, and says so in its last lines."""
    commands = {
        path.stem
        for path in (ROOT / "rmjax").glob("[!_]*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {module_of(command) for command in COMMANDS} == {f"rmjax.{name}" for name in commands}
    lines = listing().splitlines()
    assert len(lines) == len(COMMANDS) and all(line.split(maxsplit=1)[1] for line in lines)


@pytest.mark.parametrize("words", [["--help"], []])
def test_without_a_command_it_names_them(words):
    assert listing() in said(*words).stdout


def test_a_command_is_the_module_of_its_name():
    short = said("score", "--help")
    long = subprocess.run(
        [sys.executable, "-m", "rmjax.score", "--help"], capture_output=True, text=True
    )
    assert short.returncode == long.returncode == 0
    assert short.stdout == long.stdout


def test_a_mistyped_command_is_one_line_with_the_nearest():
    found = said("compile_chekc")
    assert found.returncode == 1 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert "'compile_chekc'; did you mean 'compile-check'?" in line


def test_the_version():
    assert said("--version").stdout == f"rmjax {rmjax.__version__}\n"


def test_the_package_has_the_configs():
    inside = Path(rmjax.__file__).parent / "configs"
    names = {path.name for path in inside.glob("*.py")}
    assert names == {path.name for path in (ROOT / "configs").glob("*.py")} and names
