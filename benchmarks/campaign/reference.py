"""A Llama's reward in float64 numpy, written out: what numbers at their edges are held to."""

from collections.abc import Mapping, Sequence

import numpy as np
from campaign.good import DECODER

_THETA = 10000.0


def scores(tensors: Mapping[str, np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """What the head says at the last token of one conversation; `tensors` by Hugging Face's names.

    Infinity and NaN come out where float64 has no number either.
    """
    weights = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
    with np.errstate(all="ignore"):
        x = weights["model.embed_tokens.weight"][np.asarray(tokens)]
        for layer in range(DECODER.num_hidden_layers):
            own = f"model.layers.{layer}."
            part = {k[len(own) :]: v for k, v in weights.items() if k.startswith(own)}
            x = x + _attention(part, _norm(x, part["input_layernorm.weight"]))
            x = x + _mlp(part, _norm(x, part["post_attention_layernorm.weight"]))
        return weights["score.weight"] @ _norm(x, weights["model.norm.weight"])[-1]


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + DECODER.rms_norm_eps) * scale


def _mlp(part: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate, up = x @ part["mlp.gate_proj.weight"].T, x @ part["mlp.up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T


def _attention(part: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    length, size = len(x), DECODER.head_dim
    q, k, v = (
        (x @ part[f"self_attn.{name}_proj.weight"].T).reshape(length, -1, size) for name in "qkv"
    )
    group = DECODER.num_attention_heads // DECODER.num_key_value_heads
    q, k = _rotated(q), np.repeat(_rotated(k), group, axis=1)
    logits = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(size)
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    seen = np.einsum("nqk,knh->qnh", weights, np.repeat(v, group, axis=1))
    return seen.reshape(length, -1) @ part["self_attn.o_proj.weight"].T


def _rotated(x: np.ndarray) -> np.ndarray:
    """RoPE, as Hugging Face's weights have it: the halves of a head are the pairs."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * _THETA ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
