from pathlib import Path

import pytest

from helpers.hf_models import save_hf
from helpers.models import tiny_llama
from rmjax.generation.policy import Policy, load_policy


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model, as transformers saves it."""
    return save_hf(
        tmp_path_factory.mktemp("causal"), tiny_llama(max_position_embeddings=256), causal=True
    )


@pytest.fixture(scope="session")
def policy(causal) -> Policy:
    """On all eight devices."""
    return load_policy(causal)
