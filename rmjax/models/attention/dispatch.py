"""Which implementation of attention computes a model: chosen by hardware and shapes, or forced."""

import functools
import logging
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rmjax.errors import UserError
from rmjax.models.attention import cpu_flash, gpu_cudnn, splash_mask, tpu_splash
from rmjax.models.attention.mask import Layout
from rmjax.models.attention.xla import in_blocks
from rmjax.models.decoder_config import DecoderConfig
from rmjax.runtime.sharding import Sharding

# `xla` is plain XLA and computes everything everywhere; the others need their hardware.
KERNELS = {"xla": "", "cpu_flash": "cpu", "splash": "tpu", "cudnn": "gpu"}
ATTENTION = ("auto", *KERNELS)
_log = logging.getLogger(__name__)


class AttentionPlan(Protocol):
    """A layout as a kernel wants it."""

    def attend(
        self,
        q: Float[Array, "B L N H"],
        k: Float[Array, "B L K H"],
        v: Float[Array, "B L K H"],
        soft_cap: float | None = None,
    ) -> Float[Array, "B L N H"]:
        """What `attention` gives."""
        ...


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout | AttentionPlan,
    soft_cap: float | None = None,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries, logits and softmax in float32.

    Places without a sample get arbitrary finite values.

    Args:
      q: queries.
      k: keys.
      v: values.
      layout: as rows have it, or as a kernel wants it; see `prepare`.
      soft_cap: logits x become c tanh(x / c), where it is c.

    Returns:
      The attended values, in the dtype of `q`. They have the name `RESULT` for remat policies.
    """
    if isinstance(layout, Layout):
        return in_blocks(q, k, v, layout, soft_cap)
    return layout.attend(q, k, v, soft_cap)


def platform(sharding: Sharding) -> str:
    """`tpu`, `gpu` or `cpu`: of the mesh's devices, which need not be those of this machine."""
    if not isinstance(sharding.mesh, Mesh):  # an abstract one has no devices
        return "cpu"
    name = sharding.mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def choose(
    wanted: str, decoder: DecoderConfig, sharding: Sharding, dtype: Any, row_length: int = 0
) -> str:
    """The implementation to use, a key of `KERNELS`.

    Args:
      wanted: one of `ATTENTION`. `auto` takes the kernel for the mesh's devices; where that cannot
        compute the model it takes `xla`, and says why in a warning.
      decoder: the architecture.
      sharding: the mesh.
      dtype: of the computation.
      row_length: token positions of a row; 0 if rows are made to fit, see `row_multiple`.

    Raises:
      UserError: a kernel is wanted that cannot compute this model here.
    """
    found, kind = wanted, platform(sharding)
    if wanted == "auto":
        found = next((name for name, needed in KERNELS.items() if needed == kind), "xla")
    reason = ""
    if KERNELS[found] and KERNELS[found] != kind:
        reason = f"it is for {KERNELS[found].upper()}s, and the mesh is of {kind.upper()}s"
    elif found == "splash":
        length = row_length or row_multiple(found, sharding)
        windowed = decoder.window_within(length) is not None
        reason = tpu_splash.unsupported(length, decoder.head_dim, sharding, windowed)
    elif found == "cudnn":
        reason = gpu_cudnn.unsupported(
            row_length, decoder.head_dim, jnp.dtype(dtype), decoder.attn_logit_softcapping
        )
    if not reason:
        return found
    if wanted != "auto":
        raise UserError(f"attention = {wanted!r}: {reason}; there is also 'xla', or 'auto'")
    _warn(f"attention is computed by XLA in blocks, not by {found}: {reason}")
    return "xla"


@functools.cache
def _warn(message: str) -> None:
    """Says it once, on one process."""
    if jax.process_index() == 0:
        _log.warning(message)


def prepare(
    name: str, layout: Layout, sharding: Sharding, window: int | None = None
) -> Layout | AttentionPlan:
    """A layout as implementation `name` wants it for `attention`; made once for all layers.

    Args:
      name: a key of `KERNELS`.
      layout: of the rows.
      sharding: the mesh.
      window: of the tokens whose sight the layout says to end, if it does; the same for all.
    """
    if name == "splash":
        interpret = platform(sharding) == "cpu"
        return tpu_splash.make_plan(layout, sharding, window=window, interpret=interpret)
    if name == "cpu_flash":
        return cpu_flash.make_plan(layout, sharding)
    if name == "cudnn":
        return gpu_cudnn.make_plan(layout, sharding)
    return layout


def row_multiple(name: str, sharding: Sharding) -> int:
    """Rows must be a multiple of so many positions."""
    context = sharding.mesh.shape["context"]
    return tpu_splash.SMALLEST_BLOCK * context if name == "splash" else context


def check_length(name: str, row_length: int) -> None:
    """Raises a `UserError` if a row that data need is longer than a kernel can compute."""
    if name == "cudnn" and row_length > gpu_cudnn.LONGEST:
        raise UserError(
            f"the data need rows of {row_length} positions, and cudnn computes up to "
            f"{gpu_cudnn.LONGEST}: choose attention = 'xla', or a smaller data.max_length"
        )


def computed_share(name: str) -> float:
    """Of a row's pairs of places, the share that is computed though no sample has them both."""
    return {"xla": 1.0, "cudnn": 0.5}.get(name, 0.0)


def alignment(name: str, row_length: int, decoder: DecoderConfig) -> int:
    """The positions of which the starts of a group's parts must be multiples: `RowShape.align`."""
    if name != "splash":
        return 1
    return splash_mask.alignment(row_length, decoder.window_within(row_length) is not None)
