"""`--config=FILE.py[:arg] --config.field=value`: a config file, and fields that replace its own.

A name alone, `--config=quickstart`, is that of a config that comes with the package, and the first
word of a command line may be the config without the flag.

The file is executed here and not by ml_collections, which reports what is wrong with it as a
traceback or as a mistake of the command line. Its flags for the fields are used.
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rmjax.config import Config, as_flat_dict
from rmjax.errors import UserError, listed
from rmjax.runtime.python_files import as_user_error, load_python_file

PACKAGED = Path(__file__).parent.parent / "configs"  # a clone's configs/
_NAMED = re.compile(r"--?config(=|$)")
_WRONG_FLAGS = (KeyError, ValueError, TypeError, AttributeError, flags.Error)


def parse_config(
    argv: Sequence[str], values: flags.FlagValues, options: Sequence[str] = ()
) -> list[str]:
    """Parses a command line; `values.config` becomes the config that it describes.

    Args:
      argv: the program's name and its arguments.
      values: the flags of the command.
      options: their names, of which a mistyped one may be meant.

    Returns:
      The program's name and the arguments that are no flags.

    Raises:
      UserError: no config or a broken one, or a flag that does not fit it.
    """
    given, rest = _split(argv, options)
    config = load_config(given)
    names = [*(f"config.{name}" for name in as_flat_dict(config)), *options]
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=rest)
        return values(rest)
    except _WRONG_FLAGS as error:
        raise UserError(_described(error, rest, names)) from error


def load_config(given: str) -> Config:
    """The config of `FILE.py` or `FILE.py:arg`, or of `NAME` or `NAME:arg` in the package.

    Raises:
      UserError: there is no such file, or it does not work; with the line.
    """
    file, colon, argument = given.partition(":")
    path, what = Path(file), f"--config={given}"
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a directory of another's
        raise UserError(f"{what}: cannot be looked at ({error})") from error
    bare = path.parent == Path()
    if bare and not path.is_file() and (packaged := PACKAGED / f"{path.stem}.py").is_file():
        path = packaged
    if path.is_dir():
        files = [found.name for found in sorted(path.glob("*.py"))]
        raise UserError(
            f"{what} is a directory; name a file of it: {listed(files) or 'it has no .py'}"
        )
    if not path.is_file():
        others = [str(found) for found in path.parent.glob("*.py")]
        known = sorted(found.stem for found in PACKAGED.glob("*.py")) if bare else []
        has = f" The package has {listed(known, len(known))}" if known else ""
        raise UserError(f"{what}: there is no such file{_meant(file, others + known)}{has}")
    function = getattr(load_python_file(path, what), "get_config", None)
    if not callable(function):
        raise UserError(f"{what}: {file} has no function get_config(), which returns the config")
    arguments = [argument] if colon else []
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        said = f"is given {argument!r}" if colon else "is given no argument"
        raise UserError(f"{what}: get_config() of {file} {said}: {error}") from error
    try:
        config = function(*arguments)
    except (Exception, SystemExit) as error:
        raise as_user_error(error, f"{what}: get_config()", path) from error
    if not isinstance(config, Config):
        raise UserError(
            f"{what}: get_config() of {file} returns {type(config).__name__}, expected an "
            "rmjax.config.Config"
        )
    return config


def _split(argv: Sequence[str], options: Sequence[str]) -> tuple[str, list[str]]:
    """What says the config, as one word or as two, and the command line without it."""
    given, rest, words = [], [], iter(argv)
    if len(argv) > 1 and not argv[1].startswith("-") and not any(map(_NAMED.match, argv)):
        return argv[1], [argv[0], *argv[2:]]
    for word in words:
        if _NAMED.match(word):
            given.append(word.partition("=")[2] if "=" in word else next(words, ""))
        else:
            rest.append(word)
    if len(given) > 1:
        raise UserError(f"--config is there twice: {given[0]} and {given[1]}")
    if given and given[0] and not given[0].startswith("-"):
        return given[0], rest
    for word in rest[1:]:
        name, equals, value = word.lstrip("-").partition("=")
        mistyped = word.startswith("-") and name not in options
        if mistyped and difflib.get_close_matches(name, ["config"]):
            meant = f"--config{equals}{value}"
            raise UserError(f"{word}: there is no such option; did you mean {meant}?")
    raise UserError("which experiment? --config=NAME of one in the package, or --config=FILE.py")


def _described(error: BaseException, argv: Sequence[str], names: Sequence[str]) -> str:
    """Which flag is wrong and how; the last resort is what its parser says."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"--{error.flagname}: there is no such option{_meant(error.flagname, names, '--')}"
    message = str(error.args[0] if error.args else error)
    for word in argv[1:]:
        if not re.match(r"--?config\.", word):
            continue
        name = re.split(r"=|\[", word.lstrip("-"))[0]
        inner = [other for other in names if other.startswith(f"{name}.")]
        # A section that the config leaves None has fields that `names` does not tell.
        above = any(name.startswith(f"{other}.") for other in names if other != "config")
        if name not in names and not inner and not above:
            return f"--{name}: there is no such field{_meant(name, names, '--')}"
        if inner and message.startswith(f"flag --{word.lstrip('-')}:"):
            return f"{word}: it is a group of fields; set one of them: {listed(inner)}"
    return f"the command line does not fit the config: {message}"


def _meant(name: str, names: Sequence[str], before: str = "") -> str:
    meant = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {before}{meant[0]}?" if meant else ""
