"""What a mistyped option of a command may mean is said."""

import re

import pytest

from rmjax.runtime.options import CommandParser


def parser():
    made = CommandParser("mix", "Mixes.")
    made.add_argument("--way", choices=["pairs", "best-of"], required=True)
    made.add_argument("--suffix-turn")
    return made


def parser_of_commands():
    made = CommandParser("turn", "Turns.")
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("to-left").add_argument("--angle")
    return made


@pytest.mark.parametrize(
    ("make", "words", "said"),
    [
        (parser, ["--wya=pairs"], "there is no option --wya; did you mean --way?"),
        (parser, ["--way", "pears"], "did you mean pairs?"),
        (parser, ["--way=pairs", "--zzz"], "there is no option --zzz\n"),
        (parser, [], "required: --way"),
        (parser_of_commands, ["to-lfet"], "did you mean to-left?"),
        (parser_of_commands, ["to-left", "--angel=3"], "no option --angel; did you mean --angle?"),
    ],
)
def test_a_mistake_names_what_may_be_meant(make, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        make().parse_args(words)
    assert ended.value.code == 2
    assert re.search(re.escape(said), capsys.readouterr().err)


def test_what_is_right_is_parsed():
    found = parser().parse_args(["--way=pairs", "--suff=--x"])  # argparse takes the beginning, too
    assert (found.way, found.suffix_turn) == ("pairs", "--x")
    assert parser_of_commands().parse_args(["to-left", "--angle", "3"]).angle == "3"
