"""What a compiled program's instructions cost: FLOPs, bytes of memory, bytes between devices."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rmjax.aot.attention_cost import Steps, kernel_cost
from rmjax.aot.hlo import Computation, Instruction, Module, executions, parse

# ---- matrix products --------------------------------------------------------------------------


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product, two for a multiplication with its addition; 0 for all else."""
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "dot":
        axes = instruction.attribute("lhs_contracting_dims") or ""
    elif "gemm" in (instruction.attribute("custom_call_target") or ""):  # a GPU library's
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        axes = found.group(1) if found else ""
    else:
        return 0.0
    left = computation[instruction.operands[0]].arrays[0]
    inner = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2.0 * math.prod(instruction.arrays[0].dims) * inner


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """TPUs' compiler writes matrix products as convolutions, batch axes as spatial ones.

    A spatial axis then has as many places where the kernel meets padding or the gaps of a dilation
    as where it meets data, and only the latter are work.
    """
    lhs, kernel = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    labels = re.split(r"_|->", instruction.attribute("dim_labels") or "")
    left, right, result = labels
    window = dict(
        part.split("=", 1) for part in (instruction.attribute("window") or "{}").strip("{}").split()
    )
    groups = int(instruction.attribute("batch_group_count") or 1)
    flops = 2.0 * out[result.index("f")] * out[result.index("b")] * kernel[right.index("i")]
    for axis, label in enumerate(sorted(c for c in left if c.isdigit())):
        flops *= _valid_places(
            lhs[left.index(label)],
            kernel[right.index(label)],
            out[result.index(label)],
            window,
            axis,
        )
    return flops / groups


def _valid_places(size: int, kernel: int, out: int, window: dict[str, str], axis: int) -> int:
    """Pairs of a place of the output and one of the kernel that meet a number of the input."""

    def entry(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride, low = int(entry("stride", "1")), int(entry("pad", "0_0").split("_")[0])
    base, spread = int(entry("lhs_dilate", "1")), int(entry("rhs_dilate", "1"))
    places = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * spread
    inside = (places >= 0) & (places <= (size - 1) * base) & (places % base == 0)
    return int(inside.sum())


# ---- collectives -------------------------------------------------------------------------------

_KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction that moves data between devices.

    Attributes:
      kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `permute`, `broadcast`.
      bytes: that each device sends, with a ring: (g-1)/g of the whole for a group of g, twice that
        for an all-reduce.
      group: devices that exchange with each other, by their number in the mesh, one such group.
      asynchronous: whether it runs beside computation.
      channel: its number in the program; parts of one collective have the same.
      links: ways on which it goes at once, as the compiler has planned it; 0 if it does not say.
      ends: the instruction that waits for it, of an asynchronous one; empty if none of its
        computation does.
      between_slices: whether it leaves the slice through the host, as the compiler has it done for
        TPUs; the group is then not known.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    asynchronous: bool
    channel: str = ""
    links: int = 0
    ends: str = ""
    between_slices: bool = False


def collective(
    computation: Computation, instruction: Instruction, where: str, devices: int
) -> Collective | None:
    """What `instruction` moves, or None if it is not a collective (or only awaits one).

    `where` is the name of its computation, which says more of it.
    """
    operands = sum(
        array.bytes
        for name in instruction.operands
        if name in computation
        for array in computation[name].arrays
    )
    channel = instruction.attribute("channel_id") or ""
    if instruction.opcode == "send":
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
        kind = transfer.group(1).lower().replace("_", "-") if transfer else "send"
        return Collective(kind, operands, (), True, channel, between_slices=True)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in _KINDS:
        return None
    kind, group = _KINDS[opcode], _group(instruction, devices)
    share = (len(group) - 1) / max(1, len(group))
    if kind == "all-reduce" and "reduce-scatter" in where:
        kind = "reduce-scatter"  # TPUs' fusion of an all-reduce with the slice that is kept
    factor = {
        "all-gather": len(group) - 1.0,  # of what each device has
        "all-reduce": 2 * share,
        "reduce-scatter": share,
        "all-to-all": share,
    }.get(kind, 1.0)
    asynchronous = instruction.opcode.endswith("-start") or "async" in where
    links = _links(instruction)
    return Collective(kind, operands * factor, group, asynchronous, channel, links)


def _links(instruction: Instruction) -> int:
    """Links of a torus that a collective uses at once, by the plan that TPUs' compiler writes down.

    What is moved is divided into colors. Each goes around a ring of every dimension in turn, one
    way, so that each has a link to itself. Gathers of the TensorCore are named by their dimensions,
    and use both ways of each.
    """
    rings = instruction.rest.count('"phase_rings"')
    colors = re.search(r"\bcolors:(\d+)", instruction.rest)
    dimensions = re.search(r'"emitter":"(\d)DAllGather', instruction.rest)
    if rings or colors:
        return rings or int(colors.group(1))  # pyright: ignore[reportOptionalMemberAccess]
    return 2 * int(dimensions.group(1)) if dimensions else 0


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices that an instruction joins."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs:
        source, target = re.findall(r"\d+", pairs)[:2]
        return (int(source), int(target))
    text = instruction.attribute("replica_groups") or ""
    if text.startswith("{"):
        first = re.search(r"\{([\d,]+)\}", text)
        return tuple(map(int, first.group(1).split(","))) if first else tuple(range(devices))
    named = re.match(r"mesh\[(.*?)\](?:, device_ids=\([\d,]*\))?\s*\{(.*?)\}", text)
    if named:  # mesh['fsdp'=16,'tensor'=4] {'fsdp'}
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        axes = re.findall(r"'([^']+)'", named.group(2))
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in axes else 0 for name in sizes)
        return tuple(int(i) for i in ids[index].ravel())
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        raise ValueError(f"replica groups of an unknown form: {text[:100]!r}")
    shape, source, order = (
        [int(n) for n in part.split(",")] if part else [] for part in iota.groups()
    )
    ids = np.arange(math.prod(source)).reshape(source)
    if order:
        ids = ids.transpose(order)
    return tuple(int(i) for i in ids.reshape(shape)[0].ravel())


# ---- memory traffic ------------------------------------------------------------------------------

_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
_FREE += ("after-all", "partition-id", "replica-id", "call")  # and whatever ends in "-done"


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction (not one inside a fusion) reads from and writes to main memory.

    Arrays in the chip's scratch memory are free. Of an array of which a fusion takes or replaces a
    slice, as of the weights of all layers in a loop over them, only the slice counts.
    """
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    body = None
    if instruction.opcode == "fusion":
        body = module.computations.get(str(instruction.attribute("calls")))
    total = 0.0
    replaced = False
    for position, name in enumerate(instruction.operands):
        operand = computation.get(name)
        if operand is None:
            continue
        main = sum(array.bytes for array in operand.arrays if not array.fast)
        if main and body is not None:
            taken, replaces = _taken(module, body, position)
            main = min(main, taken) if taken is not None else main
            replaced = replaced or replaces
        elif main and instruction.opcode == "dynamic-slice":
            main = instruction.arrays[0].bytes
        elif main and instruction.opcode == "dynamic-update-slice" and position == 0:
            main, replaced = 0.0, True
        total += main
    if not replaced:
        total += sum(array.bytes for array in instruction.arrays if not array.fast)
    elif instruction.opcode == "dynamic-update-slice":
        total += computation[instruction.operands[1]].arrays[0].bytes
    return total


def _taken(module: Module, body: Computation, position: int) -> tuple[float | None, bool]:
    """Bytes a fusion touches of its operand `position`, if a part, and whether it replaces them.

    A fusion may hold another one that takes the part.
    """
    names = {
        i.name for i in body.values() if i.opcode == "parameter" and i.operands[0] == str(position)
    }
    total, replaces = 0.0, False
    for instruction in body.values():
        if not names & set(instruction.operands) or instruction.opcode == "parameter":
            continue
        if instruction.opcode == "bitcast":
            names.add(instruction.name)
        elif instruction.opcode in ("dynamic-slice", "slice", "gather"):
            total += instruction.arrays[0].bytes
        elif instruction.opcode == "dynamic-update-slice" and instruction.operands[0] in names:
            total += body[instruction.operands[1]].arrays[0].bytes
            replaces = True
        elif instruction.opcode == "fusion":
            inner = module.computations[str(instruction.attribute("calls"))]
            for place in (i for i, name in enumerate(instruction.operands) if name in names):
                part, _ = _taken(module, inner, place)
                if part is None:
                    return None, False
                total += part
        else:
            return None, False
    return total, replaces


# ---- the whole program ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What one instruction costs one device, and how often it runs.

    Attributes:
      name: of the instruction.
      computation: where it is.
      times: executions.
      flops: of its matrix products.
      bytes: of main memory.
      cycles: the compiler's estimate, or `attention.kernel_cost`'s; 0 if there is none.
      collectives: what it moves between devices.
    """

    name: str
    computation: str
    times: float
    flops: float
    bytes: float
    cycles: int
    collectives: tuple[Collective, ...]


def work(
    text: str,
    devices: int,
    trips: Mapping[str, int] = MappingProxyType({}),
    attention: Steps | None = None,
) -> Iterator[StepWork]:
    """Everything of a program that costs something or waits for it, in the order it is scheduled.

    Args:
      text: of the optimised module.
      devices: that run it.
      trips: how often a loop runs whose bound is data, by its scope; see `hlo.executions`.
      attention: how the steps of the attention kernel are counted; as all taken if not given.
    """
    module = parse(text)
    for name, times in executions(module, trips).items():
        computation = module.computations[name]
        found = _begun([(i, *_inside(module, name, i, devices)) for i in computation.values()])
        # TPUs' compiler may spread a collective over the fusions beside which it runs.
        parts: dict[Any, list[str]] = defaultdict(list)
        for instruction, _, moved in found:
            for part in moved:
                parts[_spread(instruction, part)].append(instruction.name)
        last = {key: names[-1] for key, names in parts.items() if key and names[1:]}
        ends, seen = _ends(computation), set()
        awaited = {*ends.values(), *last.values()}
        for instruction, flops, moved in found:
            first = []
            for part in moved:
                key = _spread(instruction, part)
                if key in seen:
                    continue
                seen |= {key} - {None}
                beside = part.asynchronous or key in last
                end = last.get(key, ends.get(instruction.name, ""))
                first.append(dataclasses.replace(part, asynchronous=beside, ends=end))
            size, cycles = memory_bytes(module, computation, instruction), instruction.cycles
            kernel = kernel_cost(computation, instruction, attention or Steps())
            if kernel:
                flops, size, cycles = kernel.flops, kernel.bytes, kernel.cycles
            if flops or size or first or cycles or instruction.name in awaited:
                yield StepWork(instruction.name, name, times, flops, size, cycles, tuple(first))


def _spread(instruction: Instruction, part: Collective) -> tuple[str, str, float] | None:
    """What the parts of one collective have in common; None for one that is whole.

    Its number alone does not tell: all collectives of a `shard_map` have the same.
    """
    if instruction.opcode != "fusion" or not part.channel:
        return None
    return part.channel, part.kind, part.bytes


# Instructions that others are parts of, and the attribute that says which: fusions, what runs
# beside the program, and, on TPUs, what runs on their SparseCores.
_CALLED = {
    "fusion": "calls",
    "async-start": "calls",
    "custom-call": "called_computations",
}


def _inside(
    module: Module, where: str, instruction: Instruction, devices: int
) -> tuple[float, tuple[Collective, ...]]:
    """FLOPs and collectives of an instruction, of its parts too."""
    computation = module.computations[where]
    flops = product_flops(computation, instruction)
    moved = collective(computation, instruction, where, devices)
    found = () if moved is None else (moved,)
    body = str(instruction.attribute(_CALLED.get(instruction.opcode, ""))).strip("{}")
    for part in module.computations.get(body, {}).values():
        more, parts = _inside(module, body, part, devices)
        flops, found = flops + more, found + parts
    if instruction.opcode == "async-start":
        found = tuple(dataclasses.replace(part, asynchronous=True) for part in found)
    return flops, found


def _begun(
    found: list[tuple[Instruction, float, tuple[Collective, ...]]],
) -> list[tuple[Instruction, float, tuple[Collective, ...]]]:
    """Instructions with what they begin to move.

    A SparseCore is started with nothing; it moves what an update gives it later.
    """
    given = {
        i.operands[0]: i.name for i, _, _ in found if i.opcode == "async-update" and i.operands[1:]
    }
    later = {given[i.name]: moved for i, _, moved in found if moved and i.name in given}
    return [
        (i, flops, later.get(i.name, () if i.name in given else moved)) for i, flops, moved in found
    ]


def _ends(computation: Computation) -> dict[str, str]:
    """The name of what waits for each instruction that only begins or updates something."""
    ends = {}
    for instruction in computation.values():
        if not instruction.opcode.endswith("-done"):
            continue
        begun = computation.get(instruction.operands[0])
        while begun is not None:
            ends[begun.name] = instruction.name
            updates = begun.opcode.endswith("-update")
            begun = computation.get(begun.operands[0]) if updates else None
    return ends
