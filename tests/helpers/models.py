"""Small models, and a large one's sizes."""

import jax
import numpy as np

from rmjax.inference.scores import Score
from rmjax.models.decoder_config import DecoderConfig, Rope
from rmjax.models.heads import RewardHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh


def one_device() -> Sharding:
    return Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))


def tiny_llama(**changes: object) -> DecoderConfig:
    fields = dict(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    return DecoderConfig(**(fields | changes))  # type: ignore[arg-type]


ROPES = {
    "default": Rope(),
    "linear": Rope(type="linear", factor=4.0),
    "dynamic": Rope(type="dynamic", factor=2.0),
    "llama3": Rope(
        theta=500000.0,
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
}


def make_model(
    decoder: DecoderConfig, attributes: int = 5, sharding: Sharding | None = None, **options
):
    return Model(decoder, ModelOptions(sharding or one_device(), **options), RewardHead(attributes))


LLAMA_70B = DecoderConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
)


def score_array(scores: list[Score]) -> np.ndarray:
    return np.asarray([list(score.attributes.values()) for score in scores])
