"""What decoder layers are made of: products with rows of the parameter table, and norms.

B row, L token, D embed
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.lora import drop
from rmjax.models.parameters import TABLE, axis_sizes, initializer
from rmjax.models.quantization import product
from rmjax.runtime.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is computed; none of it changes what the model is.

    Attributes:
      sharding: the mesh and its tables.
      dtype: of activations and matrix products; head, norms' statistics and softmax are float32.
      remat: what is stored for the backward pass: with `none` every activation, with `dots` the
        products with weights and attention's result, with `attention` the latter and what it is
        made of, with `full` only each layer's input.
      attention: the implementation, a key of `dispatch.KERNELS`; see `dispatch.choose`.
      parts: whether places behind the last token of the fullest row are left out; see `parts`. For
        one device whose kernel skips them too, and without gradients.
    """

    sharding: Sharding
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    parts: bool = False


# By the names of `config.json`.
ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float, offset: bool = False
) -> jax.Array:
    """Root-mean-square normalisation (arXiv 1910.07467), its statistics in float32.

    Args:
      x: what is normalised.
      scale: what it is multiplied by then.
      eps: added to the mean square.
      offset: whether it is multiplied by 1 + `scale` instead.

    Returns:
      NaN where the mean square is no float32.
    """
    x32 = x.astype(jnp.float32)
    if offset:
        scale = 1.0 + scale.astype(jnp.float32)
    square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    # Squares beyond float32 would make all of `x` 0, and a wrong score of it that looks like one.
    normal = x32 * jnp.where(square < jnp.inf, jax.lax.rsqrt(square + eps), jnp.nan)
    return (normal * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def as_matrices(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """What `jnp.einsum` gives where the axes summed over end `x` and begin `weight`.

    As one product of two matrices, since XLA's CPU backend computes the gradients of the other form
    at a third of the speed. On a mesh, merging axes might cost communication.
    """
    left, right = equation.split("->")[0].split(",")
    summed = len(set(left) & set(right))
    size = math.prod(weight.shape[:summed])
    y = x.reshape(-1, size) @ weight.reshape(size, -1)
    return y.reshape(*x.shape[: x.ndim - summed], *weight.shape[summed:])


class Layer(nn.Module):
    """A module whose parameters are rows of the table, and the products with them."""

    config: DecoderConfig
    options: ModelOptions
    lora: LoraConfig = NO_LORA

    def weight(self, path: str) -> jax.Array:
        """The parameter at a path of the table, made where there is none."""
        row = TABLE[path]
        sizes = axis_sizes(self.config, self.lora)
        shape = tuple(sizes[axis] for axis in row.axes.split())
        name = path.removeprefix("layers/")
        if self.has_variable("params", name):  # `param` refuses to be asked again, in another part
            return self.get_variable("params", name)
        return self.param(name, initializer(row, self.config), shape, jnp.float32)

    def linear(self, equation: str, x: jax.Array, path: str, bias: bool = False) -> jax.Array:
        """The product with a weight, its adapter added if it has one, and its bias."""
        weight = self.weight(path)
        if isinstance(weight, jax.Array):
            y = self.multiply(equation, x, weight)
        else:  # in 8 bits
            y = product(equation, x, weight, self.options.sharding.mesh)
        if self.lora.adapts(path):
            y += self.adapter(equation, x, path)
        if not bias:
            return y
        return y + jnp.broadcast_to(self.weight(f"{path}_bias").astype(x.dtype), y.shape)

    def norm(self, x: Float[Array, "... D"], path: str) -> Float[Array, "... D"]:
        """`x` normalised, by the norm at a path of the table."""
        return rms_norm(x, self.weight(path), self.config.rms_norm_eps, self.config.row.norm_offset)

    def multiply(self, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The product of activations and a weight, in the activations' dtype."""
        multiply = jnp.einsum if self.options.sharding.mesh.size > 1 else as_matrices
        return multiply(equation, x, weight.astype(x.dtype))

    def adapter(self, equation: str, x: jax.Array, path: str) -> jax.Array:
        """What LoRA adds to the product of `equation`, by way of `rank` numbers a token."""
        factors, result = equation.split("->")
        left, right = factors.split(",")
        summed = "".join(axis for axis in right if axis in left)
        if self.lora.dropout and self.has_rng("dropout"):  # in training only
            x = drop(x, self.lora.dropout, self.make_rng("dropout"))
        z = self.multiply(f"{left},{summed}r->blr", x, self.weight(f"{path}_lora_a"))
        z = self.place(self.lora.scale * z, "row", "length", "rank")
        out = right.removeprefix(summed)
        return self.multiply(f"blr,r{out}->{result}", z, self.weight(f"{path}_lora_b"))

    def place(self, x: jax.Array, *axes: str) -> jax.Array:
        """Tells the compiler where the axes of `x` live."""
        return self.options.sharding.constrain(x, axes)
