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
from multiprocessing.connection import Connection
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

    def __init__(self, make: Callable[..., Any], cores: set[int], **kwargs: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        told = (theirs, self._run, make, cores, kwargs)
        self._process = context.Process(target=_begin, args=told, daemon=True)
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

    @staticmethod
    def _run(connection: Connection, make: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        """What the process does: answers requests."""
        work = make(**kwargs)
        connection.send(None)
        while True:
            connection.send(work(connection.recv()))

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


class Loop(Side):
    """A program that goes round by itself, in a process of its own; a piece is one round.

    Args:
      make: a function of a module, called there with `kwargs` and `pause`, which does all the work.
        It calls `pause(value)` once a round, always at the same place. A piece has the time from
        the return of one call to the next call, and the value of the latter.
      cores: see `Side`.
      clock: one of `CLOCKS`.
    """

    def __init__(self, make: Callable[..., None], cores: set[int], clock: str, **kwargs: Any):
        super().__init__(make, cores, clock=clock, **kwargs)

    @staticmethod
    def _run(connection: Connection, make: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        """What the process does: goes on when it is asked to, up to the next call of `pause`."""
        now = CLOCKS[kwargs["clock"]]
        began = now()

        def pause(value: Any = None) -> None:
            nonlocal began
            connection.send(Piece(now() - began, value))
            try:
                connection.recv()
            except EOFError:
                raise SystemExit from None
            began = now()

        make(pause=pause, **kwargs)


def _begin(
    connection: Connection,
    run: Callable[..., None],
    make: Callable[..., Any],
    cores: set[int],
    kwargs: dict[str, Any],
) -> None:
    os.sched_setaffinity(0, cores)
    try:
        run(connection, make, kwargs)
    except (EOFError, SystemExit):
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
