"""Scoring with the decoder layers' products in 8 bits, by the library qwix.

A weight is kept in 8 bits with one float32 scale for each layer and output feature; what it is
multiplied with is rounded as it comes, with one scale a token. Scales are the largest absolute
value over the largest number of the type; nothing is calibrated. A product is of 8 bits by 8 bits,
summed in int32 (int8) or float32 (fp8, which is e4m3), and scaled once at its end. Embedding,
norms, biases, attention's two products and the head stay as they are.
"""

import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rmjax.errors import UserError
from rmjax.models.parameters import PRODUCTS, Params, flatten, nest
from rmjax.runtime.sharding import Sharding

_TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
QUANTIZE = ("", *_TYPES)
# The largest absolute value becomes 127. By itself qwix makes it 127.5, from where a negative one
# goes to -127 or -128 as float32's rounding has it, which differs from program to program.
_CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}

# TPUs whose matrix units are faster in 8 bits than in bfloat16, by JAX's names of them; NVIDIA's
# GPUs by their compute capability. (A v6e takes fp8, at bfloat16's speed.)
_TPUS = {
    "int8": ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"),
    "fp8": ("TPU7", "TPU7x"),
}
_CAPABILITY = {"int8": (7, 5), "fp8": (8, 9)}
CHIPS = {
    "int8": "TPU v5e, v5p and v6e, and NVIDIA's GPUs from Turing on",
    "fp8": "TPU7x, and NVIDIA's GPUs from Ada and Hopper (H100, H200) on",
}


def check_quantize(kind: str, sharding: Sharding) -> None:
    """Before anything is read: is there such a kind, and the library? Warns where it is emulated.

    Raises:
      UserError: an unknown kind, or qwix is not installed.
    """
    if kind not in QUANTIZE:
        raise UserError(f"quantize = {kind!r}: there are {', '.join(map(repr, QUANTIZE))}")
    if not kind:
        return
    _qwix()
    if not has_products(sharding.mesh, kind):
        devices: Any = sharding.mesh.devices
        warnings.warn(
            f"quantize = {kind!r}: {devices.flat[0].device_kind} has no such products, and "
            f"computes the same scores more slowly than without; {CHIPS[kind]} have them",
            stacklevel=3,
        )


def has_products(mesh: Mesh | AbstractMesh, kind: str) -> bool:
    """Whether the devices of `mesh`, of which one stands for all, multiply in 8 bits."""
    if isinstance(mesh, AbstractMesh):
        return True
    device: Any = mesh.devices.flat[0]
    if device.platform == "tpu":
        return device.device_kind in _TPUS[kind]
    capability = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or not all(part.isdigit() for part in capability):
        return False  # a CPU, or a GPU of another maker
    return tuple(map(int, capability)) >= _CAPABILITY[kind]


def quantize_params(params: Params, sharding: Sharding, kind: str) -> Params:
    """The same parameters, the layers' weights as `qwix.QArray`s; laid out as before.

    Args:
      params: the model's. The weights among them are freed one by one: do not use them again.
      sharding: the mesh.
      kind: `int8` or `fp8`.

    Raises:
      UserError: qwix is not installed.
    """
    leaves = flatten(params)
    for row in PRODUCTS:
        leaf, axes, summed = leaves.pop(row.path), row.all_axes, row.summed.split()
        placed = sharding.parameter(axes)
        spec = [None if axis in summed else part for axis, part in zip(axes, placed.spec)]
        scale = NamedSharding(placed.mesh, PartitionSpec(*spec))
        kept = tuple(i for i, axis in enumerate(axes) if axis not in summed)
        rounded: Any = jax.jit(_rounded, static_argnums=(1, 2), out_shardings=(placed, scale))
        qvalue, scales = rounded(leaf, kind, kept)
        leaves[row.path] = _qwix().QArray(qvalue, scales, qtype=_TYPES[kind])
        jax.block_until_ready(qvalue)
        leaf.delete()
    return nest(leaves)


def product(equation: str, x: jax.Array, weight: Any, mesh: Mesh | AbstractMesh) -> jax.Array:
    """`jnp.einsum(equation, x, weight)` of activations and a quantised weight.

    Args:
      equation: of an einsum that sums over all axes of `x` but its first two, [row, length].
      x: activations.
      weight: a `qwix.QArray` of one layer.
      mesh: its devices say whether the product is made in 8 bits or, with the same roundings,
        in float32.

    Returns:
      The product in the dtype of `x`.
    """
    qwix = _qwix()
    kind = next(name for name, dtype in _TYPES.items() if weight.qvalue.dtype == dtype)
    rounded = qwix.QArray(*_rounded(x, kind, (0, 1)), qtype=_TYPES[kind])
    if has_products(mesh, kind):
        return qwix.einsum(equation, rounded, weight).astype(x.dtype)
    return jnp.einsum(
        equation,
        qwix.dequantize(rounded),
        qwix.dequantize(weight),
        precision=jax.lax.Precision.HIGHEST,
    ).astype(x.dtype)


def _rounded(x: jax.Array, kind: str, kept: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """`x` in 8 bits and its scales, one for each place along the axes `kept`.

    A scale is NaN where a number is not finite: compiled for a CPU, the largest of NaN and others
    may be one of the others.
    """
    # In float32 throughout: bfloat16's own rounding would add to that of 8 bits.
    rounded = _qwix().quantize(
        x.astype(jnp.float32),
        _TYPES[kind],
        channelwise_axes=kept,
        calibration_method=_CALIBRATION[kind],
    )
    others = tuple(axis for axis in range(x.ndim) if axis not in kept)
    finite = jnp.isfinite(x).all(axis=others, keepdims=True)
    return rounded.qvalue, jnp.where(finite, rounded.scale, jnp.nan)


def _qwix() -> Any:
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise UserError(
            "quantize: products in 8 bits need the library qwix; pip install 'rmjax[quantize]'"
        ) from error
