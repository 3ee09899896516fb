"""Multi-attribute reward models in JAX: train, convert and score."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmjax.convert import hf_to_orbax, orbax_to_hf
    from rmjax.errors import UserError
    from rmjax.generation.completions import Completion, SamplingSettings
    from rmjax.generation.policy import Policy, load_policy
    from rmjax.generation.server import ServerEngine, open_server
    from rmjax.inference.load import load
    from rmjax.inference.scorer import Scorer
    from rmjax.inference.scores import Comparison, Score
    from rmjax.models.rewards.aggregation import PUBLISHED

# transformers advises to install torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = [
    "PUBLISHED",
    "Comparison",
    "Completion",
    "Policy",
    "SamplingSettings",
    "Score",
    "Scorer",
    "ServerEngine",
    "UserError",
    "__version__",
    "hf_to_orbax",
    "load",
    "load_policy",
    "open_server",
    "orbax_to_hf",
]

_HOMES = {
    "rmjax.inference.load": ("load",),
    "rmjax.inference.scorer": ("Scorer",),
    "rmjax.convert": ("hf_to_orbax", "orbax_to_hf"),
    "rmjax.errors": ("UserError",),
    "rmjax.generation.completions": ("Completion", "SamplingSettings"),
    "rmjax.generation.policy": ("Policy", "load_policy"),
    "rmjax.generation.server": ("ServerEngine", "open_server"),
    "rmjax.inference.scores": ("Comparison", "Score"),
    "rmjax.models.rewards.aggregation": ("PUBLISHED",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import rmjax` by itself costs nothing."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'rmjax' has no attribute {name!r}")
