"""How long a program should take: work over what the chip and its networks can do at best.

A prediction, with everything it assumes in `predict`; what a chip can do is in `hardware.py`.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from rmjax.aot.costs import Collective, StepWork
from rmjax.aot.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Network:
    """The way between the devices of a group.

    Attributes:
      name: the mesh axes along which they lie, and `slow` if between slices or hosts.
      bandwidth: bytes/s at which each of them can send.
      dimensions: of the torus; what shares one of them is moved one after the other.
    """

    name: str
    bandwidth: float
    dimensions: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective on one network, in total over all loop iterations of a step.

    Attributes:
      kind: as in `costs.Collective`.
      network: see `Network.name`.
      count: executions.
      bytes: that each device sends.
      seconds: bytes over bandwidth.
      asynchronous: share of the bytes that the compiler moves beside computation.
    """

    kind: str
    network: str
    count: float
    bytes: float
    seconds: float
    asynchronous: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One step on one device, seconds unless said otherwise.

    Attributes:
      flops: of matrix products, what is computed twice included.
      bytes: read from and written to main memory.
      compute: flops at the chip's peak.
      memory: bytes at the memory's peak.
      operations: the compiler's own estimate of every operation, one after the other.
      networks: bytes of each network at its bandwidth.
      traffic: the same by kind of collective.
      step: what is predicted; see `predict`.
      floor: the largest of compute, memory and each network: nothing can be faster.
      serial: operations and all networks one after the other: nothing overlaps.
    """

    flops: float
    bytes: float
    compute: float
    memory: float
    operations: float
    networks: dict[str, float]
    traffic: tuple[Traffic, ...]
    step: float

    @property
    def floor(self) -> float:
        """The largest of compute, memory and each network."""
        return max(self.compute, self.memory, *self.networks.values(), 0.0)

    @property
    def serial(self) -> float:
        """Everything one after the other."""
        return max(self.floor, self.operations + sum(self.networks.values()))


def predict(work: Iterable[StepWork], mesh: Mesh, chip: Chip) -> Prediction:
    """The time of one step from the program's work.

    An operation takes the cycles the TPU compiler estimates for it, which include reading and
    writing main memory; the GPU compiler states none, so there it is the larger of FLOPs at the
    chip's peak and bytes at the memory's. A collective takes its bytes over the bandwidth of the
    links that the compiler has planned for it.

    Each loop body is played through in the order in which the compiler has scheduled it. What it
    made asynchronous begins where it is scheduled to begin, or when its links are free. Whatever
    is scheduled until the instruction that waits for it runs beside it, and nothing else does. All
    other collectives run by themselves. So a gather hides only what the compiler found to put
    beside it, in this order, in the same pass through the loop.

    No step is faster than its floor, in which reads of main memory are counted as if nothing
    stayed on the chip between operations. Left out: latency, starting and ending loops, the host,
    and what collectives take of the main memory's bandwidth.
    """
    flops = memory = operations = step = 0.0
    traffic: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    bodies: dict[tuple[str, float], _Clock] = defaultdict(_Clock)
    for item in work:
        flops += item.times * item.flops
        memory += item.times * item.bytes
        clock = bodies[item.computation, item.times]
        for moved in item.collectives:
            way = network(moved, mesh, chip)
            seconds = moved.bytes / way.bandwidth
            clock.move(moved, way, seconds)
            total = traffic[moved.kind, way.name]
            total[0] += item.times
            total[1] += item.times * moved.bytes
            total[2] += item.times * seconds
            total[3] += item.times * moved.bytes * moved.asynchronous
        if item.flops or not item.collectives:
            seconds = operation_seconds(item, chip)
            operations += item.times * seconds
            clock.now += seconds
        clock.wait(item.name)
    for (_, times), clock in bodies.items():
        step += times * clock.ended
    networks: dict[str, float] = defaultdict(float)
    for (_, name), (_, _, seconds, _) in traffic.items():
        networks[name] += seconds
    rows = (
        Traffic(kind, name, count, size, seconds, hidden / size if size else 0.0)
        for (kind, name), (count, size, seconds, hidden) in traffic.items()
    )
    found = Prediction(
        flops=flops,
        bytes=memory,
        compute=flops / chip.flops,
        memory=memory / chip.memory_bandwidth,
        operations=operations,
        networks=dict(networks),
        traffic=tuple(sorted(rows, key=lambda row: -row.bytes)),
        step=step,
    )
    return dataclasses.replace(found, step=max(step, found.floor))


class _Clock:
    """One pass through a loop body, in seconds.

    Attributes:
      now: when the next operation begins.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._free: dict[Any, float] = defaultdict(float)  # when a link is
        self._ends: dict[str, float] = defaultdict(float)  # of what is awaited by an instruction

    def move(self, moved: Collective, way: Network, seconds: float) -> None:
        """A collective, or its beginning."""
        links = way.dimensions or (way.name,)
        end = max(self.now, *(self._free[link] for link in links)) + seconds
        for link in links:
            self._free[link] = end
        if moved.asynchronous:
            self._ends[moved.ends] = max(self._ends[moved.ends], end)
        else:
            self.now = end

    def wait(self, name: str) -> None:
        """The instruction `name` ends; what it waits for has ended by then."""
        self.now = max(self.now, self._ends.pop(name, 0.0))

    @property
    def ended(self) -> float:
        """When all that was begun has ended."""
        return max(self.now, *self._ends.values(), 0.0)


def operation_seconds(item: StepWork, chip: Chip) -> float:
    """Time of one operation: the compiler's estimate, or its roofline if there is none."""
    if chip.clock:
        return item.cycles / chip.clock
    return max(item.flops / chip.flops, item.bytes / chip.memory_bandwidth)


def network(moved: Collective, mesh: Mesh, chip: Chip) -> Network:
    """On which network a collective runs, and how fast each device can send there at best.

    On a torus a group spans some dimensions; it has two links a dimension if it goes once around
    it, else one, and no more than the compiler has planned to use. A permutation has the two
    directions of one dimension. Behind a switch, all of a device's links.
    """
    if moved.between_slices:
        return Network("data (slow)", chip.slow)
    devices = [mesh.devices.flat[i] for i in moved.group]
    axes = _axes(moved.group, mesh)
    name = " x ".join(axes) or "itself"
    if len({_host_or_slice(device, chip) for device in devices}) > 1:
        return Network(f"{name} (slow)", chip.slow)
    if not chip.torus:
        return Network(name, chip.link)
    everywhere = [device.coords for device in mesh.devices.flat]
    links, dimensions = 0, []
    for dimension in range(len(everywhere[0])):
        extent = len({coords[dimension] for coords in everywhere})
        spanned = len({device.coords[dimension] for device in devices})
        if spanned > 1:
            around = spanned == extent and extent % chip.torus == 0
            links += 2 if around else 1
            dimensions.append(dimension)
    links = 2 if moved.kind == "permute" else max(1, min(links, moved.links or links))
    return Network(name, links * chip.link, tuple(dimensions))


def _host_or_slice(device: Any, chip: Chip) -> int:
    return getattr(device, "slice_index", 0) if chip.torus else device.process_index


def _axes(group: Sequence[int], mesh: Mesh) -> list[str]:
    """The mesh axes along which the devices of a group differ."""
    sizes, found = list(mesh.shape.values()), []
    for place, name in enumerate(mesh.shape):
        stride = math.prod(sizes[place + 1 :])
        if len({number // stride % sizes[place] for number in group}) > 1:
            found.append(name)
    return found
