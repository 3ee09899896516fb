"""The attention kernel for NVIDIA's GPUs: cuDNN's, through `jax.nn.dot_product_attention`.

It knows causality, and everything else of a layout as a mask of all pairs of positions, made once
for all layers. It skips what causality hides, nothing else. JAX 0.10 has it compute the mask's
gradient as well, which nobody uses; JAX 0.11 and 0.12 do not.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from rmjax.models.attention.mask import RESULT, Layout, sees
from rmjax.runtime.sharding import Sharding

LONGEST = 16384  # positions of a row, whose mask then takes 256 MiB, and twice that in a layer
_WIDEST = 128  # on every GPU that has the kernel; some take more

_ROWS, _LENGTH, _HEADS = ("data", "fsdp"), "context", "tensor"  # as sharding.ACTIVATION_AXES says
_ACTIVATION = P(_ROWS, _LENGTH, _HEADS)
_MASK = P(_ROWS, None, _LENGTH)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask"],
    meta_fields=["sharding", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class CudnnPlan:
    """What the kernel needs of a layout.

    Attributes:
      mask: which keys each query sees.
      sharding: of the rows.
      implementation: `cudnn`, or `xla` for the same with XLA's operations, as tests do on CPUs.
    """

    mask: Bool[Array, "B 1 L L"]
    sharding: Sharding
    implementation: Any

    def attend(
        self,
        q: Float[Array, "B L N H"],
        k: Float[Array, "B L K H"],
        v: Float[Array, "B L K H"],
        soft_cap: float | None = None,
    ) -> Float[Array, "B L N H"]:
        """What `attention.attention` gives, by the kernel."""
        assert soft_cap is None  # `unsupported` refuses it
        whole = self.sharding.mesh.shape[_LENGTH] == 1

        def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            if not whole:
                k, v = (jax.lax.all_gather(x, _LENGTH, axis=1, tiled=True) for x in (k, v))
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=whole, implementation=self.implementation
            )

        out = jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=(_ACTIVATION, _ACTIVATION, _ACTIVATION, _MASK),
            out_specs=_ACTIVATION,
            check_vma=False,
        )(q, k, v, self.mask)
        return checkpoint_name(out, RESULT)


def unsupported(row_length: int, head_dim: int, dtype: Any, soft_cap: float | None = None) -> str:
    """Why the kernel cannot be had for such a model; empty if it can."""
    if soft_cap is not None:
        return f"it has no soft cap, and the model's attn_logit_softcapping is {soft_cap:g}"
    if dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        return f"it computes in 16 bits, and dtype is {dtype}"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"head_dim = {head_dim} is not a multiple of 8 up to {_WIDEST}"
    if row_length > LONGEST:
        return f"rows of {row_length} positions are longer than {LONGEST}"
    if row_length % 2:
        return f"rows of {row_length} positions are of odd length"
    return ""


def make_plan(layout: Layout, sharding: Sharding, *, implementation: str = "cudnn") -> CudnnPlan:
    """Derives the mask from a layout; `implementation` as in `CudnnPlan`.

    Padding sees itself, so that no query sees nothing.
    """
    positions = jnp.arange(layout.segment_ids.shape[1])
    seen = sees(layout, positions, layout.keys, positions)
    mask = (seen | (positions[:, None] == positions[None, :])[None])[:, None]
    mask = jax.lax.with_sharding_constraint(mask, NamedSharding(sharding.mesh, _MASK))
    return CudnnPlan(mask, sharding, implementation)
