"""Steps that are computed at once, where one by itself leaves a core idle.

On a CPU a step is products that use all cores and, between them, much that uses one. A second step
fills the gaps: two at once score 1.4 times as fast on two cores (docs/benchmarks.md).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from jax.sharding import AbstractMesh, Mesh

_Step = TypeVar("_Step")
_Found = TypeVar("_Found")
ON_CPU = 2  # each has its own activations


def in_flight(
    function: Callable[[_Step], _Found], steps: Iterable[_Step], mesh: Mesh | AbstractMesh
) -> Iterator[_Found]:
    """What a function gives for each step, in their order.

    Several devices must be given programs in one order on all of them, and one accelerator is kept
    busy by one program, so there it is one step after the other.

    Args:
      function: runs a program, and waits for it. It is called from other threads.
      steps: taken one by one, in the caller's thread.
      mesh: on which the programs run.
    """
    if mesh.size > 1 or _platform(mesh) != "cpu":
        yield from map(function, steps)
        return
    with ThreadPoolExecutor(ON_CPU, "rmjax-step") as pool:
        waiting: deque[Future[_Found]] = deque()
        for step in steps:
            waiting.append(pool.submit(function, step))
            if len(waiting) > ON_CPU:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _platform(mesh: Mesh | AbstractMesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""
