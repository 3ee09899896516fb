"""Models that several test files read."""

import numpy as np
import pytest

from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.models.decoder_config import DecoderConfig


@pytest.fixture(scope="module")
def causal_state(tmp_path_factory) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    decoder = tiny_llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6)
    source = save_hf(tmp_path_factory.mktemp("causal"), decoder, causal=True)
    weights = SafetensorsWeights(source)
    return decoder, {key: weights.read(key) for key in weights.keys()}  # noqa: SIM118
