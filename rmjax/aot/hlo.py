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
    for line in _lines(text):
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and current is not None and " = " in line:
            instruction = _instruction(line)
            for name in instruction.operands:
                if "#" in name and name not in current:
                    current[name] = _element(current, name)
            current[instruction.name] = instruction
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("the program's text has no ENTRY computation")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines of a module, whole: what describes a Pallas kernel contains line breaks."""
    held: list[str] = []
    for line in text.splitlines():
        if held and line.startswith(('"', "}}")):
            held.append(line)
            continue
        if held:
            yield "".join(held)
        held = [line]
    yield "".join(held)


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
    operands = tuple(re.findall(r"%[\w.\-<>]+(?:#\d+)?", body[start:stop]))
    if opcode in ("constant", "parameter"):
        operands = (body[start + 1 : stop - 1],)
    name = head.removeprefix("ROOT ")
    return Instruction(name, opcode, arrays, operands, body[stop:], head.startswith("ROOT "))


def _element(computation: Computation, name: str) -> Instruction:
    """What `%x#3`, as JAX 0.12 writes an operand, stands for: the element 3 of a tuple `%x`."""
    whole, index = name.split("#")
    arrays = computation[whole].arrays
    if int(index) >= len(arrays):
        raise ValueError(f"{name}: {whole} has {len(arrays)} elements")
    array = arrays[int(index)]
    return Instruction(name, "get-tuple-element", (array,), (whole,), f", index={index}", False)


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


def executions(module: Module, trips: Mapping[str, int]) -> dict[str, float]:
    """How often each computation runs by itself: loops multiply, branches count once each.

    What a fusion, a reduction or the like calls is part of that instruction and not in here.

    Args:
      module: the program.
      trips: how often a loop runs whose bound is data, by the name of the scope it is written in.

    Raises:
      ValueError: such a loop is in another scope.
    """
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for instruction in module.computations[name].values():
            each = _trips(module, name, instruction, trips) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                visit(called, count * each)

    visit(module.entry, 1)
    return times


def _called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs as such: loops, calls, branches."""
    names = {
        "while": ("condition", "body"),
        "conditional": ("branch_computations", "true_computation", "false_computation"),
        "call": ("to_apply",),
        "call-start": ("to_apply", "calls"),
    }.get(instruction.opcode, ())
    text = " ".join(instruction.attribute(name) or "" for name in names)
    return re.findall(r"%[\w.\-<>]+", text)


def _trips(module: Module, where: str, loop: Instruction, unknown: Mapping[str, int]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[str(loop.attribute("condition"))]
    test = next(i for i in condition.values() if i.root)
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return _told_trips(loop, unknown)
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
        return _told_trips(loop, unknown)
    step = _step(module.computations[str(loop.attribute("body"))], index)
    return -(-(last - (first or 0)) // step)


def _told_trips(loop: Instruction, trips: Mapping[str, int]) -> int:
    """How often a loop runs by its scope: `chunks` in `op_name="jit(f)/.../chunks/while"`."""
    found = re.search(r'op_name="[^"]*?([^"/]+)/while"', loop.rest)
    scope = found.group(1) if found else ""
    if scope not in trips:
        raise ValueError(f"nothing says how often {loop.name} runs, in scope {scope!r}")
    return trips[scope]


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
