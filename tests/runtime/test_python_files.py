"""Python files that a user gives: config files and functions."""

import re

import pytest

from rmjax.errors import UserError
from rmjax.runtime.python_files import load_python_file


def test_files_of_one_name_are_two_modules(tmp_path):
    """The module of each is its own, so that its classes and functions can find it."""
    for directory, value in (("a", 1), ("b", 2)):
        (tmp_path / directory).mkdir()
        text = (
            f"import sys\nVALUE = {value}\n\ndef told():\n    return sys.modules[__name__].VALUE\n"
        )
        (tmp_path / directory / "reward.py").write_text(text)
    one, other = (load_python_file(tmp_path / d / "reward.py", "it") for d in "ab")
    assert (one.told(), other.told()) == (1, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = (2:\n", "raised SyntaxError: .* line 2"),
        ("import nothing_of_this_name\n", "raised ModuleNotFoundError: .* line 1"),
        ("import json\n\njson.loads('{')\n", "raised JSONDecodeError: .* line 3"),
    ],
)
def test_what_a_file_raises_is_named_with_its_line(text, said, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    place = re.escape(str(file))
    with pytest.raises(UserError, match=rf"^it: loading {place} {said[:-7]}\({place}{said[-7:]}\)"):
        load_python_file(file, "it")
