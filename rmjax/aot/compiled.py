"""One program, compiled for chips that need not exist: the bytes it takes, what it does, how long.

What kind of program it is, is its caller's business: a training step or a chunk of sampling.
"""

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rmjax.aot.attention_cost import Steps
from rmjax.aot.costs import work
from rmjax.aot.hardware import Chip
from rmjax.aot.roofline import Prediction, predict
from rmjax.errors import UserError

# GPU: kernels are chosen by trying them, which needs one; the compiler's own choice is taken.
_COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {},
    "cuda": {"xla_gpu_autotune_level": "0"},
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler makes of a program, on one chip.

    Attributes:
      peak: bytes of all that lives at once, arguments included, as the compiler lays it out.
      fits: whether the compiler accepts the program and the chip has room for it.
      prediction: FLOPs, traffic and time; None if it does not fit, or cannot be read.
      unread: why the compiler's program cannot be read, if so.
    """

    peak: int
    fits: bool
    prediction: Prediction | None
    unread: str = ""


def compile_program(
    traced: jax.stages.Traced,
    mesh: Mesh,
    chip: Chip,
    trips: Mapping[str, int],
    attention: Steps,
) -> Compiled:
    """Compiles a traced function for the devices of `mesh` and counts what it does.

    Args:
      traced: the function, with the shapes and shardings of its arguments.
      mesh: of the devices.
      chip: which they are.
      trips: how often loops run whose bound is data; see `hlo.executions`.
      attention: how the steps of the attention kernel are counted.

    Raises:
      UserError: the compiler refuses it for another reason than its size.
    """
    platform = "tpu" if chip.torus else "cuda"
    lowered = traced.lower(lowering_platforms=(platform,))
    try:
        compiled, text = _compile(lowered, platform)
    except jax.errors.JaxRuntimeError as error:
        return Compiled(_needed(str(error)), False, None)
    stats = compiled.memory_analysis()
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    fits = peak <= chip.memory
    try:
        costs = work(text, mesh.size, trips, attention)
        return Compiled(peak, fits, predict(costs, mesh, chip))
    except ValueError as error:  # the compiler is newer than `hlo`, which reads its text
        why = f"JAX {jax.__version__}: {str(error).splitlines()[0][-160:]}"
        return Compiled(peak, fits, None, why)


def _compile(lowered: jax.stages.Lowered, platform: str) -> tuple[Any, str]:
    """The compiled program, and its text as the compiler wrote it.

    TPUs' compiler is asked to write it to a directory. JAX's own way to the text goes through a
    parser that may be older than the compiler, and then refuses what runs on the SparseCores.
    """
    with tempfile.TemporaryDirectory() as directory:
        options: Any = dict(_COMPILER_OPTIONS[platform])
        if platform == "tpu":
            options |= {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        if platform != "tpu":
            return compiled, compiled.as_text() or ""
        written = sorted(Path(directory).glob("*.after_codegen.txt"))
        return compiled, written[-1].read_text() if written else ""


def _needed(message: str) -> int:
    """Bytes that a program which does not fit would need, from the compiler's refusal."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    if not found:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0][:400]}")
    return int(float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1))
