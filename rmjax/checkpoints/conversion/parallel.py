"""Work on the slices of a model: several at once, bounded by their bytes, with a progress bar."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rmjax.checkpoints.tensor_slices import TensorSlice

# Of slices at once. A slice needs about five times its bytes while it is read, transposed and
# written.
_IN_FLIGHT_BYTES = 256 << 20
_THREADS = 8
_LINES = 10  # printed by a conversion where there is no terminal for a bar
_LINE_SECONDS = 10.0  # the least time between two lines


def for_each_slice(
    slices: Sequence[TensorSlice], work: Callable[[TensorSlice], None], what: str
) -> None:
    """Calls `work` on every slice, in threads, at most `_IN_FLIGHT_BYTES` of slices at once.

    After an error or Ctrl-C no more slices are begun, and those under way are finished.
    """
    running: dict[Future[None], int] = {}
    with (
        _ByteProgress(what, sum(part.nbytes for part in slices)) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        try:
            for part in slices:
                while running and sum(running.values()) + part.nbytes > _IN_FLIGHT_BYTES:
                    _take_finished(running, progress)
                running[pool.submit(work, part)] = part.nbytes
            while running:
                _take_finished(running, progress)
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _take_finished(running: dict[Future[None], int], progress: "_ByteProgress") -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
        progress.advance(running.pop(future))


class _ByteProgress:
    """A bar in a terminal, with rate and time left; elsewhere a few lines, none if it is quick."""

    def __init__(self, what: str, total: int):
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._what, self._total, self._done, self._console = what, total, 0, console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> "_ByteProgress":
        self._started = self._last_line = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        self._progress.advance(self._task, count)
        now = time.monotonic()
        tenth = self._done * _LINES // max(1, self._total) > before * _LINES // max(1, self._total)
        if not self._console.is_terminal and tenth and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            rate = self._done / (now - self._started)
            self._console.print(
                f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, "
                f"{rate / 1e9:.2f} GB/s, {(self._total - self._done) / rate:.0f} s left"
            )
