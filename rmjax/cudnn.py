"""The attention kernel for NVIDIA's GPUs: cuDNN's, through `jax.nn.dot_product_attention`.

It knows causality, and everything else of a layout as numbers added to the logits: 0 where a query
sees a key. They are made once for all layers and take two bytes for each pair of places.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rmjax.mask import RESULT, Layout, sees
from rmjax.sharding import Sharding

_LONGEST = 16384  # places of a row, for which a row's bias takes half a GiB
_WIDEST = 128  # on every GPU that has the kernel; some take more

_ROWS, _LENGTH, _HEADS = ("data", "fsdp"), "context", "tensor"  # as sharding.ACTIVATION_AXES says
_ACTIVATION = P(_ROWS, _LENGTH, _HEADS)
_BIAS = P(_ROWS, None, _LENGTH)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias"],
    meta_fields=["sharding", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel needs of a layout.

    Attributes:
      bias: what is added to the logits.
      sharding: of the rows.
      implementation: `cudnn`, or `xla` for the same with XLA's operations, as tests do on CPUs.
    """

    bias: Float[Array, "B 1 L L"]
    sharding: Sharding
    implementation: Any

    def attend(
        self, q: Float[Array, "B L N H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]
    ) -> Float[Array, "B L N H"]:
        """What `attention.attention` gives, by the kernel."""
        whole = self.sharding.mesh.shape[_LENGTH] == 1

        def local(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            if not whole:
                k, v = (jax.lax.all_gather(x, _LENGTH, axis=1, tiled=True) for x in (k, v))
            return jax.nn.dot_product_attention(
                q, k, v, bias, is_causal=whole, implementation=self.implementation
            )

        out = jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=(_ACTIVATION, _ACTIVATION, _ACTIVATION, _BIAS),
            out_specs=_ACTIVATION,
            check_vma=False,
        )(q, k, v, jax.lax.stop_gradient(self.bias))
        return checkpoint_name(out, RESULT)


def unsupported(row_length: int, head_dim: int, dtype: Any) -> str:
    """Why the kernel cannot be had for such a model; empty if it can."""
    if dtype not in (jnp.dtype("bfloat16"), jnp.dtype("float16")):
        return f"it computes in 16 bits, and dtype is {dtype}"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"head_dim = {head_dim} is not a multiple of 8 up to {_WIDEST}"
    if row_length > _LONGEST:
        return f"rows of {row_length} places are longer than {_LONGEST}"
    if row_length % 2:
        return f"rows of {row_length} places are of odd length"
    return ""


def make_plan(
    layout: Layout, sharding: Sharding, dtype: Any, *, implementation: str = "cudnn"
) -> Plan:
    """Derives the bias from a layout; `implementation` as in `Plan`.

    Padding sees itself, so that no query sees nothing.
    """
    places = jnp.arange(layout.segments.shape[1])
    seen = sees(layout, places, layout.segments, places)
    seen = seen | (places[:, None] == places[None, :])[None]
    far = jnp.asarray(0.7 * float(jnp.finfo(dtype).min), dtype)
    bias = jnp.where(seen, jnp.zeros((), dtype), far)[:, None]
    return Plan(
        sharding.constrain(bias, ("row", "head_dim", "length", "head_dim")),
        sharding,
        implementation,
    )
