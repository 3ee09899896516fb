"""LoRA: a model's own weights are frozen, and two thin matrices beside some products are trained.

Where a product was x W, it is

    x W + (alpha / rank) dropout(x) A B

with A of [what is summed over, rank] and B of [rank, what comes out]. Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. The rows of A and B in the
table of parameters are `parameters.ADAPTERS`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rmjax.models.decoder_config import LoraConfig


def drop(x: Float[Array, "..."], share: float, key: jax.Array) -> jax.Array:
    """`x` with that share of its numbers zero and the others so much larger, by `key` alone."""
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0.0)


def merge_block(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale A B in float32, of a block of one layer.

    Args:
      weight: [in..., out...], any float.
      a: float32 [in..., rank].
      b: float32 [rank, out...].
      scale: of A B.
    """
    return weight.astype(np.float32) + np.float32(scale) * np.tensordot(a, b, 1)


def merge_adapters(leaves: dict[str, jax.Array], lora: LoraConfig) -> dict[str, jax.Array]:
    """Parameters by path, A B added to each weight that has them and left out themselves.

    Each sum is computed in float32, layer by layer, and is in the dtype of the weight and where
    that was. The weights that change are freed: do not use them again.
    """
    leaves = dict(leaves)
    for path in [path for path in leaves if lora.adapts(path)]:
        weight, a, b = (leaves.pop(name) for name in (path, f"{path}_lora_a", f"{path}_lora_b"))
        merge: Any = jax.jit(
            _merge_layers, static_argnums=3, donate_argnums=0, out_shardings=weight.sharding
        )
        leaves[path] = merge(weight, a, b, lora.scale)
    return leaves


def _merge_layers(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    def merge(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = layer
        added = scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + added).astype(weight.dtype)

    return jax.lax.map(merge, (weight, a, b))
