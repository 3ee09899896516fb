"""Config files that do not work, and command lines that do not fit them: one clear line."""

import re

import pytest
from absl import flags

from helpers.paths import ROOT
from rmjax.errors import UserError
from rmjax.training.config_file import load_config, parse_config

QUICKSTART = f"{ROOT}/configs/quickstart.py"
BROKEN = {  # a file's text and what is said of it
    "def get_config(arg=None:\n    pass\n": "raised SyntaxError: invalid syntax ({file} line 1)",
    "import nothing_such\n": "ModuleNotFoundError: No module named 'nothing_such' ({file} line 1)",
    "def get_config():\n    x = 1\n    return {}['a']\n": "raised KeyError: 'a' ({file} line 3)",
    "def get_config():\n    raise ValueError('no')\n": "raised ValueError: no ({file} line 2)",
    "from rmjax.config import Config\n\n\ndef get_config():\n    return Config(nothing=1)\n": (
        "raised TypeError: Config.__init__() got an unexpected keyword argument 'nothing' "
        "({file} line 5)"
    ),
    "def get_config():\n    open('none.txt')\n": "'none.txt' ({file} line 2)",
    "open('none.txt')\n": "'none.txt' ({file} line 1)",
    "def config():\n    pass\n": "{file} has no function get_config()",
    "def get_config():\n    return 3\n": "get_config() of {file} returns int, expected",
    "def get_config(a, b):\n    pass\n": "is given no argument: missing a required argument: 'a'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_named_with_its_line(text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(BROKEN[text].format(file=file))):
        load_config(str(file))


def test_a_name_alone_is_a_config_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config("quickstart.py") == load_config(QUICKSTART)
    with pytest.raises(UserError, match=r"no such file; did you mean quickstart\? The package has"):
        load_config("quickstrat")
    with pytest.raises(UserError, match=r"configs/quickstart: there is no such file$"):
        load_config("configs/quickstart")
    (tmp_path / "quickstart.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match="returns int"):  # one's own goes first
        load_config("quickstart.py")


def test_files_that_are_none(tmp_path):
    (tmp_path / "one.py").write_text("def get_config():\n    pass\n")
    for given, said in {
        tmp_path: "is a directory; name a file of it: one.py",
        tmp_path / "oen.py": f"no such file; did you mean {tmp_path / 'one.py'}?",
        f"{tmp_path / 'one.py'}:x": "is given 'x': too many positional arguments",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            load_config(str(given))


def parsed(*arguments: str):
    values = flags.FlagValues()
    flags.DEFINE_integer("slices", 1, "Of something.", flag_values=values)
    rest = parse_config(["train", *arguments], values, ["config", "slices"])  # as commands do
    return values.config, rest[1:]


@pytest.mark.parametrize(
    "arguments",
    [
        (f"--config={QUICKSTART}", "--config.steps=3", "DST"),
        ("quickstart", "--config.steps=3", "DST"),
        ("--config", QUICKSTART, "--config.steps", "3", "DST"),
        ("-config.steps=3", "DST", f"-config={QUICKSTART}"),
    ],
    ids=" ".join,
)
def test_a_command_line_in_each_form(arguments):
    config, rest = parsed(*arguments)
    assert config.steps == 3 and config.data.train == "generated:6000" and rest == ["DST"]


WRONG = {
    ("--confg=a.py",): "--confg=a.py: there is no such option; did you mean --config=a.py?",
    ("--config",): "which experiment? --config=NAME",
    (): "which experiment?",
    ("--config=a.py", "--config=b.py"): "--config is there twice: a.py and b.py",
}
WRONG_BESIDE_A_CONFIG = {
    "--config.stps=3": "--config.stps: there is no such field; did you mean --config.steps?",
    "--config.data.trian=x": "no such field; did you mean --config.data.train?",
    "--confg.steps=3": "--confg.steps: there is no such option; did you mean --config.steps?",
    "--slice=3": "--slice: there is no such option; did you mean --slices?",
    "--config.steps=x": "flag --config.steps=x: invalid literal for int()",
    "--config.optimizer=x": "--config.optimizer=x: it is a group of fields; set one of them: "
    "config.optimizer.",
    "--config.steps": "Missing value for flag --config.steps",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_what_is_wrong_about_the_config_is_said(arguments):
    with pytest.raises(UserError, match=re.escape(WRONG[arguments])):
        parsed(*arguments)


@pytest.mark.parametrize("argument", WRONG_BESIDE_A_CONFIG)
def test_a_flag_that_does_not_fit_is_named(argument):
    with pytest.raises(UserError, match=re.escape(WRONG_BESIDE_A_CONFIG[argument])):
        parsed(f"--config={QUICKSTART}", argument)
