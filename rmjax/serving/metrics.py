"""Counts of what a server does, in Prometheus' text format (version 0.0.4).

Each number is changed by one thread alone, so that none is lost.
"""

import bisect
import itertools
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Count:
    """A number that grows, by labels."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()):
        self.name, self.help, self._labels = name, help, labels
        self._values: Counter[tuple[str, ...]] = Counter() if labels else Counter({(): 0})

    def add(self, number: float, *labels: str) -> None:
        """Adds to the number that has these labels."""
        self._values[labels] += number  # pyright: ignore[reportArgumentType]

    def lines(self) -> list[str]:
        """As Prometheus reads it."""
        found = _head(self.name, self.help, "counter")
        for labels, value in sorted(self._values.items()):
            found.append(f"{self.name}{_shown(self._labels, labels)} {value:.15g}")
        return found


class Histogram:
    """How often a number was at most each of some bounds."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = _SECONDS):
        self.name, self.help, self._bounds = name, help, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, number: float) -> None:
        """Adds a number."""
        self._counts[bisect.bisect_left(self._bounds, number)] += 1
        self._sum += number

    def lines(self) -> list[str]:
        """As Prometheus reads it."""
        found = _head(self.name, self.help, "histogram")
        totals = list(itertools.accumulate(self._counts))
        for bound, total in zip((*self._bounds, "+Inf"), totals):
            shown = bound if isinstance(bound, str) else f"{bound:g}"
            found.append(f'{self.name}_bucket{{le="{shown}"}} {total}')
        return [*found, f"{self.name}_sum {self._sum:.9g}", f"{self.name}_count {totals[-1]}"]


class Gauge:
    """A number as it is when it is asked for."""

    def __init__(self, name: str, help: str, read: Callable[[], float]):
        self.name, self.help, self._read = name, help, read

    def lines(self) -> list[str]:
        """As Prometheus reads it."""
        return [*_head(self.name, self.help, "gauge"), f"{self.name} {self._read():.15g}"]


class Metrics:
    """All numbers of a server."""

    def __init__(self):
        self.requests = Count("rmjax_requests_total", "Requests answered.", ("path", "status"))
        self.gone = Count("rmjax_requests_gone_total", "Requests whose client went away.")
        self.seconds = Histogram("rmjax_request_seconds", "Seconds to the reply of a POST.")
        self.conversations = Count("rmjax_conversations_total", "Conversations scored.")
        self.tokens = Count("rmjax_tokens_total", "Their tokens, each alone.")
        self.cut = Count("rmjax_conversations_cut_total", "Conversations that lost first tokens.")
        self.batches = Histogram("rmjax_batch_seconds", "Seconds of a batch.")
        self.batch_sizes = Histogram(
            "rmjax_batch_conversations", "Conversations of a batch.", _SIZES
        )
        self.gauges = [Gauge("process_resident_memory_bytes", "Memory in use.", _memory)]

    def text(self) -> str:
        """All of them."""
        every = [each for each in vars(self).values() if not isinstance(each, list)]
        return "\n".join(line for each in [*every, *self.gauges] for line in each.lines()) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _shown(names: Sequence[str], values: Sequence[str]) -> str:
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for v in values)
    inner = ",".join(f'{name}="{value}"' for name, value in zip(names, escaped))
    return f"{{{inner}}}" if inner else ""


def _memory() -> float:
    """Bytes in memory; where the system does not say, the most that there were."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
