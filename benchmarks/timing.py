"""Programs timed in turn: each in a process of its own, one working while the others are stopped.

On a machine that is not quiet, two programs timed one after the other are not compared. So pieces
of work alternate between them, and what is reported are medians of the pieces and of their ratios.
"""

import atexit
import dataclasses
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

# The time that passes, and the time that a process's threads compute.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of work: seconds it took, and a value to compare between sides."""

    seconds: float
    value: Any


class Side:
    """A program in a process of its own, held to the given cores.

    Args:
      make: a function of a module; called there with `kwargs`, it returns the work, a function
        from a request to a `Piece`. All that is slow and not timed belongs in it.
      cores: the CPUs it may use; `make` sees to it that as many threads compute.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Piece]], cores: set[int], **kwargs: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, cores, kwargs), daemon=True
        )
        self._process.start()
        atexit.register(self._process.kill)  # one that is stopped does not hear anything else
        theirs.close()
        self._answer()
        self._signal(signal.SIGSTOP)

    def __call__(self, request: Any) -> Piece:
        """Has one piece of work done."""
        self._signal(signal.SIGCONT)
        self._connection.send(request)
        piece = self._answer()
        self._signal(signal.SIGSTOP)
        return piece

    def close(self) -> None:
        """Ends the process, so that its memory is free again."""
        self._connection.close()
        self._signal(signal.SIGCONT)
        self._process.join()

    def _signal(self, number: int) -> None:
        """Stops the process, whose threads might spin on the other's cores, or wakes it."""
        os.kill(self._process.pid or 0, number)

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise SystemExit("a side ended without a word; was it out of memory?") from None
        if isinstance(answer, str):
            raise SystemExit(answer)
        return answer


def _serve(connection: Any, make: Callable[..., Any], cores: set[int], kwargs: Any) -> None:
    os.sched_setaffinity(0, cores)
    try:
        work = make(**kwargs)
        connection.send(None)
        while True:
            connection.send(work(connection.recv()))
    except EOFError:
        return
    except BaseException:
        connection.send(traceback.format_exc())


def in_turn(sides: dict[str, Side], requests: Sequence[Any]) -> dict[str, list[Piece]]:
    """Every side does every request; they take turns, and take turns at being first."""
    pieces: dict[str, list[Piece]] = {name: [] for name in sides}
    for turn, request in enumerate(requests):
        order = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in order:
            pieces[name].append(sides[name](request))
    return pieces


def speedup(slow: Sequence[Piece], fast: Sequence[Piece]) -> float:
    """The median of the pieces' ratios, request by request."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(slow, fast, strict=True))


def rate(pieces: Sequence[Piece], amounts: Sequence[int]) -> float:
    """The median of amounts per second."""
    return statistics.median(n / piece.seconds for piece, n in zip(pieces, amounts, strict=True))


def load_average() -> str:
    """How busy the machine was in the last 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())
