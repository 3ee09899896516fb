"""What a compiled program does, counted from its text.

XLA's own `cost_analysis` counts the body of a loop once, so that 80 layers are one, and does not
count collectives at all. The text of the optimised module says everything that is needed: each
instruction's shapes, which loop it is in and how often that runs, who takes part in a collective,
and, on TPUs, how many cycles the compiler estimates for it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_NO_ESTIMATE = 2**63 - 1  # the largest int64, where the compiler has none


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `fast` if it lives on the chip's own scratch memory."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> float:
        """Its size; tuples' empty parts and tokens have none."""
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # attributes, as text
    root: bool

    def attribute(self, name: str) -> str | None:
        """The text of attribute `name=...` up to the next comma at the same depth."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        return _until_comma(self.rest, found.end()) if found else None

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if it states none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        value = int(found.group(1)) if found else 0
        return 0 if value == _NO_ESTIMATE else value


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the one it starts with."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of an optimised module, as `jax.stages.Compiled.as_text` gives it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("the program's text has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head, body = _COMMENT.sub("", line).strip().split(" = ", 1)
    end = _matching(body, 0) if body.startswith("(") else body.index(" ")
    shape, body = body[:end], body[end:].lstrip()
    opcode, start = body[: body.index("(")], body.index("(")
    stop = _matching(body, start)
    arrays = tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(shape)
    )
    operands = tuple(re.findall(r"%[\w.\-<>]+", body[start:stop]))
    if opcode in ("constant", "parameter"):
        operands = (body[start + 1 : stop - 1],)
    name = head.removeprefix("ROOT ")
    return Instruction(name, opcode, arrays, operands, body[stop:], head.startswith("ROOT "))


def _matching(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket is not closed: {text[start : start + 80]!r}")


def _until_comma(text: str, start: int) -> str:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth < 0 or (depth == 0 and text[place] == ","):
            return text[start:place]
    return text[start:]


def executions(module: Module, unknown_trips: int) -> dict[str, float]:
    """How often each computation runs by itself: loops multiply, branches count once each.

    What a fusion, a reduction or the like calls is part of that instruction and not in here.

    Args:
      module: the program.
      unknown_trips: how often a loop runs whose bound is data.
    """
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for instruction in module.computations[name].values():
            trips = 1
            if instruction.opcode == "while":
                trips = _trips(module, name, instruction, unknown_trips)
            for called in _called(instruction):
                visit(called, count * trips)

    visit(module.entry, 1)
    return times


def _called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs as such: loops, calls, branches, asynchronous ones."""
    names = {
        "while": ("condition", "body"),
        "conditional": ("branch_computations", "true_computation", "false_computation"),
        "call": ("to_apply",),
        "call-start": ("to_apply", "calls"),
        "async-start": ("calls",),
    }.get(instruction.opcode, ())
    text = " ".join(instruction.attribute(name) or "" for name in names)
    return re.findall(r"%[\w.\-<>]+", text)


def _trips(module: Module, where: str, loop: Instruction, unknown: int) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[str(loop.attribute("condition"))]
    test = next(i for i in condition.values() if i.root)
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return unknown
    counter, bound = (condition[name] for name in test.operands)
    start = module.computations[where][loop.operands[0]]
    index = int(counter.attribute("index") or 0)
    first = _constant(module.computations[where], start.operands[index])
    if bound.opcode == "constant":
        last = _number(bound)
    else:
        place = int(bound.attribute("index") or 0)
        last = _constant(module.computations[where], start.operands[place])
    if last is None:
        return unknown
    step = _step(module.computations[str(loop.attribute("body"))], index)
    return -(-(last - (first or 0)) // step)


def _step(body: Computation, index: int) -> int:
    """By how much a loop's counter, element `index` of what it carries, grows each time."""
    root = next(i for i in body.values() if i.root)
    if root.opcode != "tuple":
        return 1
    following = body[root.operands[index]]
    while following.opcode in ("copy", "bitcast") and following.operands[0] in body:
        following = body[following.operands[0]]
    if following.opcode == "add":
        for name in following.operands:
            step = _constant(body, name)
            if step:
                return step
    return 1


def _constant(computation: Computation, name: str) -> int | None:
    """The integer an instruction stands for, if it is one, seen through copies."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    return _number(instruction) if instruction and instruction.opcode == "constant" else None


def _number(constant: Instruction) -> int | None:
    try:
        return int(constant.operands[0])
    except ValueError:
        return None


# ---- matrix products --------------------------------------------------------------------------


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product, two for a multiplication with its addition; 0 for all else."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0]
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        inner = math.prod(left.dims[int(axis)] for axis in contracted)
        return 2.0 * math.prod(instruction.arrays[0].dims) * inner
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call" and "gemm" in (
        instruction.attribute("custom_call_target") or ""
    ):
        left = computation[instruction.operands[0]].arrays[0]
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        contracted = re.findall(r"\d+", axes.group(1)) if axes else []
        inner = math.prod(left.dims[int(axis)] for axis in contracted)
        return 2.0 * math.prod(instruction.arrays[0].dims) * inner
    return 0.0


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
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    asynchronous: bool


def collective(
    computation: Computation, instruction: Instruction, where: str, devices: int
) -> Collective | None:
    """What `instruction` moves, or None if it is not a collective (or only awaits one)."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in _KINDS:
        return None
    kind, group = _KINDS[opcode], _group(instruction, devices)
    operands = sum(
        array.bytes
        for name in instruction.operands
        if name in computation
        for array in computation[name].arrays
    )
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
    return Collective(kind, operands * factor, group, asynchronous)


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
_FREE += (
    "after-all",
    "partition-id",
    "replica-id",
    "copy-done",
    "slice-done",
    "async-done",
    "call",
)


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
            taken, replaces = _taken(body, position)
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


def _taken(body: Computation, position: int) -> tuple[float | None, bool]:
    """Bytes a fusion touches of its operand `position`, if a part, and whether it replaces them."""
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
        else:
            return None, False
    return total, replaces


# ---- the whole program ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What one instruction costs one device, and how often it runs.

    Attributes:
      computation: where it is.
      times: executions.
      flops: of its matrix products.
      bytes: of main memory.
      cycles: the compiler's estimate; 0 if there is none.
      collectives: what it moves between devices.
    """

    computation: str
    times: float
    flops: float
    bytes: float
    cycles: int
    collectives: tuple[Collective, ...]


def work(text: str, devices: int, unknown_trips: int = 1) -> Iterator[Work]:
    """Everything of a program that costs something.

    Args:
      text: of the optimised module.
      devices: that run it.
      unknown_trips: how often a loop runs whose bound is data.
    """
    module = parse(text)
    for name, times in executions(module, unknown_trips).items():
        computation = module.computations[name]
        for instruction in computation.values():
            flops, moved = _inside(module, name, instruction, devices)
            size = memory_bytes(module, computation, instruction)
            if flops or size or moved or instruction.cycles:
                yield Work(name, times, flops, size, instruction.cycles, moved)


def _inside(
    module: Module, where: str, instruction: Instruction, devices: int
) -> tuple[float, tuple[Collective, ...]]:
    """FLOPs and collectives of an instruction, of a fusion's parts too."""
    computation = module.computations[where]
    flops = product_flops(computation, instruction)
    moved = collective(computation, instruction, where, devices)
    found = () if moved is None else (moved,)
    body = str(instruction.attribute("calls"))
    if instruction.opcode == "fusion" and body in module.computations:
        for part in module.computations[body].values():
            more, parts = _inside(module, body, part, devices)
            flops, found = flops + more, found + parts
    return flops, found
