"""Many requests to a server under way at once."""

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Asked = TypeVar("_Asked")
_Reply = TypeVar("_Reply")


def in_threads(
    answer: Callable[[_Asked], _Reply],
    asked: Iterable[_Asked],
    most: int,
    seconds: float = math.inf,
) -> Iterator[tuple[_Asked, _Reply]]:
    """Requests with their answers, as they come; the first failure is raised and ends all.

    The threads are daemons: a command that is interrupted does not wait for answers.

    Args:
      answer: makes a request.
      asked: what to make requests of.
      most: requests that are under way at once.
      seconds: in which all must be answered, however the server drips.

    Raises:
      TimeoutError: they were not.
    """
    todo: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Asked, _Reply | BaseException]] = queue.SimpleQueue()
    over = threading.Event()
    count, end = 0, time.monotonic() + seconds
    for count, one in enumerate(asked, 1):  # noqa: B007
        todo.put(one)

    def work() -> None:
        while not over.is_set():
            try:
                one = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((one, answer(one)))
            except BaseException as error:  # is raised below, in the thread that asked
                done.put((one, error))

    for _ in range(min(most, count)):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in itertools.repeat(None, count):
            left = end - time.monotonic()
            try:
                one, found = done.get(timeout=max(0.0, left) if left < math.inf else None)
            except queue.Empty as error:
                raise TimeoutError from error
            if isinstance(found, BaseException):
                raise found
            yield one, found
    finally:
        over.set()
