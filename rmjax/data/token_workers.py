"""Processes that make tokens at once, where there are more cores than the tokenizer's threads fill.

They are begun as `python FILE` with pipes. A fork would copy the locks of JAX's threads, and
multiprocessing's way without one imports the script that is run again, which then has to be made
for that, and which a notebook has not. What goes through the pipes is pickled, as multiprocessing
does it: both ends are this program.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rmjax.data import token_worker
from rmjax.data.portion import Answer, Encoded, PortionEncoder, Said
from rmjax.errors import UserError

# Rows are read by one process, which has no more for others to do.
_MOST = 8


class Workers:
    """Processes, and a thread for each that waits for its answer; make them with `begun_workers`.

    Attributes:
      count: of them.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], encode: PortionEncoder):
        """None of them has been told anything."""
        self.count, self._encode = len(processes), encode
        # What the encoder has found out goes along, so that all go on as one.
        self._start = _pickled(sys.path) + _pickled(encode)
        self._free: queue.SimpleQueue[tuple[subprocess.Popen[bytes], bytes]] = queue.SimpleQueue()
        for process in processes:
            self._free.put((process, self._start))
        self._threads = ThreadPoolExecutor(self.count, "tokenize")

    def submit(self, entries: Sequence[Said]) -> Future[Answer]:
        """Has the tokens of a portion made; see `tokens`.

        What a template shows is tried here, in the order of the rows, and sent along: it may
        depend on the message that it is tried with, and must not on which process had it first.
        """
        encoder = self._encode.encoder
        for conversation, _ in (said for entry in entries for said in entry):
            encoder.learn(conversation)
        return self._threads.submit(self._ask, _pickled((entries, encoder.kinds)))

    def tokens(self, asked: Future[Answer]) -> list[Encoded]:
        """The tokens of a portion, when they are made.

        Raises:
          UserError: as `PortionEncoder` does; or the process that made them was ended.
        """
        answer = asked.result()
        self._encode.encoder.unread.update(answer.unread)
        if answer.error:
            raise answer.error
        if answer.traceback:
            raise RuntimeError(f"a process that makes tokens failed:\n{answer.traceback}")
        return answer.encoded

    def close(self) -> None:
        """Waits for no answer; the processes have been killed."""
        self._threads.shutdown(cancel_futures=True)

    def _ask(self, portion: bytes) -> Answer:
        process, start = self._free.get()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(start + portion)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(_ended(process)) from error
        finally:
            self._free.put((process, b""))


@contextlib.contextmanager
def begun_workers(encode: PortionEncoder) -> Iterator[Workers | None]:
    """As many processes as there are cores; None where they are of no use, or cannot be.

    At the end none of them is left, whatever they were doing.
    """
    processes: list[subprocess.Popen[bytes]] = []
    workers = None
    try:
        if (count := min(_cores(), _MOST)) > 1:
            # A tokenizer that cannot be sent, or no room for processes: this one does it.
            with contextlib.suppress(OSError, pickle.PicklingError, TypeError, AttributeError):
                for _ in range(count):
                    processes.append(_begin())
                workers = Workers(processes, encode)
        yield workers
    finally:
        for process in processes:
            process.kill()
        if workers:
            workers.close()
        for process in processes:
            _close(process)


def _begin() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", token_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A core each: there is one for every process.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        process_group=0,  # Ctrl-C is for this process, which ends them
    )


def _close(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what nobody took is still to be written
            if pipe:
                pipe.close()


def _ended(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    status = process.returncode
    hint = ", as the system does where memory is short" if status == -signal.SIGKILL else ""
    return f"a process that makes tokens was ended (status {status}{hint}): run the command again"


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def _cores() -> int:
    """Those that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(allowed(0)) if allowed else os.cpu_count() or 1
