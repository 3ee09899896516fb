"""Several processes of one run, on this machine."""

import contextlib
import dataclasses
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from helpers import forked

LIMIT = 240.0  # seconds after which a process counts as hung


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclasses.dataclass
class Ended:
    """What became of a process."""

    code: int
    out: str
    err: str


class Running:
    """A process whose output goes to files, so that a full pipe never holds it up."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        for name in ("out", "err"):
            (log / name).touch()
        self.process = forked.start(
            arguments, out=log / "out", err=log / "err", environment=environment
        )

    def out(self) -> str:
        return (self.log / "out").read_text()

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Until the process has printed `text`."""
        end = time.monotonic() + limit
        while text not in self.out():
            assert self.process.exitcode is None, (self.log / "err").read_text()
            assert time.monotonic() < end, f"{text!r} is not in {self.out()!r}"
            time.sleep(0.02)

    def wait(self, limit: float = LIMIT) -> Ended:
        return Ended(forked.wait(self.process, limit), self.out(), (self.log / "err").read_text())


@contextlib.contextmanager
def started(
    arguments: Sequence[str],
    *,
    processes: int = 2,
    devices: int = 4,
    environment: Mapping[str, str] | None = None,
    each: Sequence[Sequence[str]] | None = None,
) -> Iterator[list[Running]]:
    """Processes that find each other by flags; killed at the end whatever happens.

    Args:
      arguments: of Python, up to the flags.
      processes: how many.
      devices: emulated on each.
      environment: more of it.
      each: further arguments of each process.
    """
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    settings = {"JAX_NUM_CPU_DEVICES": str(devices), **(environment or {})}
    with contextlib.ExitStack() as stack:
        running = []
        for i in range(processes):
            log = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            own = [coordinator, f"--processes={processes}", f"--process={i}"]
            if processes == 1:
                own = []
            one = Running([*arguments, *own, *(each[i] if each else ())], settings, log)
            running.append(one)
            stack.callback(_kill, one.process)
        yield running


def _kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()


def run_all(arguments: Sequence[str], **options) -> list[Ended]:
    """Starts processes (see `started`) and waits for their ends."""
    with started(arguments, **options) as running:
        return [one.wait() for one in running]
