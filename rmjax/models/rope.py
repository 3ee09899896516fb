"""Rotary position embeddings (arXiv 2104.09864): default, linear and llama3.

The half-split layout of Hugging Face is kept, so weights convert without a permutation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from rmjax.models.decoder_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, "H/2"]:
    """Radians per position of each pair of features.

    llama3 follows Meta's reference code: wavelengths beyond the original context are stretched by
    `factor`, short ones kept, and those between are interpolated.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.type != "llama3":
        return frequencies
    context = rope.original_max_position_embeddings
    wavelength = 2 * np.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)


def rotate(
    x: Float[Array, "B L N H"],
    cos: Float32[Array, "B L H/2"],
    sin: Float32[Array, "B L H/2"],
) -> Float[Array, "B L N H"]:
    """Rotates each pair (i, i + H/2) of features by its angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def angles(
    positions: Int32[Array, "B L"], frequencies: jax.Array | np.ndarray
) -> tuple[Float32[Array, "B L H/2"], Float32[Array, "B L H/2"]]:
    """Cosine and sine of position x frequency; `frequencies` is [H/2] or [B, L, H/2]."""
    shape = (*positions.shape, frequencies.shape[-1])
    phase = positions[..., None].astype(jnp.float32) * jnp.broadcast_to(frequencies, shape)
    return jnp.cos(phase), jnp.sin(phase)
