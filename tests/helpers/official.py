"""The official `rewardbench` package's functions, without the packages that only its models need.

pip install --no-deps rewardbench
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest


def load_official() -> tuple[Any, Any]:
    """Its modules `constants` and `utils`; skips the test where it is not installed."""
    spec = importlib.util.find_spec("rewardbench")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no official package: `pip install --no-deps rewardbench`")
    directory = Path(spec.submodule_search_locations[0])
    stand_ins = {"fastchat": {}, "fastchat.conversation": {"Conversation": object}}
    stand_ins["rewardbench.models"] = {"REWARD_MODEL_CONFIG": {}}
    stand_ins["rewardbench"] = {"__path__": []}
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, values in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        return tuple(_module(directory / f"{name}.py") for name in ("constants", "utils"))  # type: ignore[return-value]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_official_pipeline() -> Any:
    """Its class that scores texts by a model; skips the test where it is not installed."""
    spec = importlib.util.find_spec("rewardbench")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no official package: `pip install --no-deps rewardbench`")
    directory = Path(spec.submodule_search_locations[0])
    return _module(directory / "models" / "pipeline.py").RewardBenchPipeline


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"official_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
