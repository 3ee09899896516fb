"""One program, compiled for chips that need not exist: the bytes it takes, what it does, how long.

What kind of program it is, is its caller's business: a training step or a chunk of sampling.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rmjax.aot.attention_cost import Steps
from rmjax.aot.costs import work
from rmjax.aot.hardware import Chip
from rmjax.aot.roofline import Prediction, predict
from rmjax.errors import UserError

# TPU: embeddings that are looked up, or added to, on the SparseCores cannot be written as text by
# every version of JAX. GPU: kernels are chosen by trying them, which needs one; the compiler's own
# choice is taken.
_COMPILER_OPTIONS = {
    "tpu": {
        "xla_tpu_offload_gather_to_sparsecore": "false",
        "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    },
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
        options: Any = _COMPILER_OPTIONS[platform]
        compiled: Any = lowered.compile(compiler_options=options)
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
        costs = work(compiled.as_text(), mesh.size, trips, attention)
        return Compiled(peak, fits, predict(costs, mesh, chip))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # The compiler is newer than what reads it: JAX's writer of its text, or `hlo`.
        why = f"JAX {jax.__version__}: {str(error).splitlines()[0][-160:]}"
        return Compiled(peak, fits, None, why)


def _needed(message: str) -> int:
    """Bytes that a program which does not fit would need, from the compiler's refusal."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    if not found:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0][:400]}")
    return int(float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1))
