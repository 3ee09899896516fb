"""What attention kernels cost, of which the compiler's text says next to nothing.

The TPUs' kernel goes over blocks of queries and of keys; how many of these steps it takes is data
(see `splash.py`), and here follows from what rows are said to hold. What a step costs follows from
the arrays it is given and, for time, from how the compiler schedules it. The GPUs' kernel skips
what causality hides and no more.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rmjax.aot.hardware import Chip
from rmjax.aot.hlo import Computation, Instruction

_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "all": 5}  # matrix products a step
_PHASES = tuple(_PRODUCTS)  # `all`: dq and dkv at once
# Operands of which each step reads a block.
_AGAIN = {"fwd": (3, 4), "dq": (3, 4), "dkv": (2, 8), "all": (2, 8)}
SCHEDULED = 512  # the block for which a chip's cycles are stated


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the kernel's steps are counted.

    Attributes:
      taken: share of them that are taken: 1 where nothing is known of the rows.
      cycles: of a step of 512 queries and keys, by phase; see `hardware.Chip`.
    """

    taken: float = 1.0
    cycles: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One call of the kernel: FLOPs of its products, bytes of main memory, cycles (0: unknown)."""

    flops: float
    bytes: float
    cycles: int


def kernel_cost(
    computation: Computation, instruction: Instruction, steps: Steps
) -> KernelCost | None:
    """What a call of a kernel costs; None if `instruction` is something else."""
    target = instruction.attribute("custom_call_target") or ""
    if "__cudnn$fmha" in target:
        return _cudnn_cost(computation, instruction, backward="Backward" in target)
    if target != '"tpu_custom_call"':
        return None
    found = re.search(r"splash_mha_(fwd|dq|dkv)_", instruction.rest)
    if not found:
        return None
    phase = found.group(1)
    if phase == "dkv" and len(instruction.arrays[0].dims) == 4:  # parts of dq come first
        phase = "all"
    operands = [computation[name].arrays[0] for name in instruction.operands]
    heads, queries, width = operands[2].dims
    _, first, second = operands[0].dims  # blocks, of which one axis is all rows end to end
    block = queries // first if phase in ("fwd", "dq") else operands[3].dims[1] // second
    taken = heads * first * second * steps.taken
    flops = taken * _PRODUCTS[phase] * 2.0 * block * block * width
    size = sum(a.bytes for a in (*operands, *instruction.arrays) if not a.fast)
    for again in (operands[place] for place in _AGAIN[phase]):
        if not again.fast:
            size += taken * block * width * again.bytes / np.prod(again.dims) - again.bytes
    cycles = steps.cycles[_PHASES.index(phase)] * (block / SCHEDULED) ** 2
    return KernelCost(flops, max(0.0, float(size)), round(taken * cycles))


def _cudnn_cost(computation: Computation, instruction: Instruction, backward: bool) -> KernelCost:
    operands = [computation[name].arrays[0] for name in instruction.operands]
    rows, queries, heads, width = operands[0].dims
    pairs = rows * heads * queries * operands[1].dims[1]
    if '"mask_type": "CAUSAL"' in instruction.rest:
        pairs /= 2
    products = _PRODUCTS["all" if backward else "fwd"]
    size = sum(array.bytes for array in (*operands, *instruction.arrays))
    return KernelCost(products * 2.0 * pairs * width, size, 0)


def steps_taken(
    groups: list[tuple[int, list[int]]],
    length: int,
    context: int,
    window: int | None = None,
    block: int = SCHEDULED,
) -> float:
    """The share of its steps that the busiest device takes for a row of `groups`.

    Args:
      groups: of each how many tokens its samples begin with in common, and all tokens of each.
      length: places of the row; what its groups leave is padding.
      context: devices that share the row's queries.
      window: tokens of its sample that a token sees; None for all before it.
      block: queries and keys of a block.
    """
    count = -(-length // block)
    taken = np.eye(count, dtype=bool)

    def blocks(start: int, end: int) -> np.ndarray:
        return np.arange(start // block, -(-end // block) if end > start else start // block)

    def take(queries: tuple[int, int, int], keys: tuple[int, int, int]) -> None:
        """Of parts of a row: where they begin and end in it, and begin in their sample."""
        (start, end, first), (key_start, key_end, key_first) = queries, keys
        mine, theirs = blocks(start, end), blocks(key_start, key_end)
        earliest = np.maximum(mine * block, start) - start + first
        latest = np.minimum(theirs * block + block, key_end) - 1 - key_start + key_first
        near = earliest[:, None] - latest[None] < (length if window is None else window)
        taken[np.ix_(mine, theirs)] |= near

    place = 0
    for shared, lengths in groups:
        common = (place, place + shared, 0)
        take(common, common)
        place += shared
        for own in (n - shared for n in lengths):
            mine = (place, place + own, shared)
            take(mine, mine)
            take(mine, common)
            place += own
    taken &= np.tri(count, dtype=bool)
    parts = np.array_split(taken, context)
    return max(float(part.mean()) for part in parts)


def kernel_steps(
    group: tuple[int, list[int]],
    places: int,
    length: int,
    context: int,
    chip: Chip,
    windows: Sequence[int | None] = (None,),
) -> Steps:
    """`Steps` for rows that hold as many groups like `group`, of `places` places, as fit.

    One loop goes over all layers, so a step of it counts as taken by the mean of their `windows`.
    """
    groups = [group] * max(1, length // places)
    taken = {window: steps_taken(groups, length, context, window) for window in set(windows)}
    return Steps(float(np.mean([taken[window] for window in windows])), chip.attention)
