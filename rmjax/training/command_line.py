"""`--config=FILE.py[:arg] --config.field=value`, with errors a user can read.

A command imports this before it imports what it runs, so that `--help` waits for nothing: what
brings jax is imported here where it is used.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from rmjax.errors import UserError, answer_interrupts, exit_with_message

# For `--help`; `parse_config` puts the config itself in its place.
flags.DEFINE_string("config", None, "The experiment: configs/NAME.py[:arg].", allow_override=True)
# Not needed on a TPU pod, nor below srun or mpirun.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def answer_help() -> None:
    """Prints what `--help` asks for, and ends the program; else only makes Ctrl-C brief.

    A command calls it before it imports what it runs, which takes a second.
    """
    answer_interrupts()
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, "options:", sep="\n")
        for described in (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__)):
            if described:
                print(described.strip().partition("\n")[2])  # without the module's name
        sys.exit()


def run_with_config(
    run: Callable[..., None], *, together: bool = True, arguments: Sequence[str] = ()
) -> None:
    """Parses the command line and calls `run` with the config and the arguments that it has.

    Args:
      run: the command.
      together: whether many processes run it as one, if there are many.
      arguments: names of what stands on the command line without a flag; all must be there.
    """

    def parse(argv: list[str]) -> list[str]:
        from rmjax.training.config_file import parse_config

        modules = (sys.argv[0], __name__)
        own = [f.name for m in modules for f in flags.FLAGS.get_key_flags_for_module(m)]
        return parse_config(argv, flags.FLAGS, own)

    def main(argv: list[str]) -> None:
        given = argv[1:]
        if len(given) > len(arguments):
            raise UserError(
                f"unexpected argument {given[len(arguments)]!r}; fields are --config.field=value"
            )
        if len(given) < len(arguments):
            raise UserError(f"{arguments[len(given)]} is missing from the command line")
        from rmjax.runtime.cluster import initialize
        from rmjax.runtime.processes import run_together

        _hush()
        config = flags.FLAGS.config
        if together:
            initialize(
                coordinator=_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value
            )
            run_together(lambda: run(config, *given))
        else:
            exit_with_message(lambda: run(config, *given))

    exit_with_message(lambda: app.run(main, argv=sys.argv, flags_parser=parse))


def _hush() -> None:
    """Leaves of a failed read or write what is raised.

    Orbax reports the same error for each of its tasks as well, with tracebacks: in the log, as
    warnings about coroutines, and from callbacks that find their event loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # absl turns on jax's remarks about backends that are not there.
    logging.getLogger("jax").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    before = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = report
