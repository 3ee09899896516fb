"""Which module may import which, and what an import may not load."""

import ast
import graphlib
import subprocess
import sys

import pytest

from helpers.paths import ROOT

# From the bottom to the top: a module imports its own layer and those before it.
LAYERS = (
    "rmjax.errors",
    "rmjax.runtime",
    "rmjax.models",
    "rmjax.config",
    "rmjax.data",
    "rmjax.checkpoints",
    "rmjax.checkpoints.conversion",
    "rmjax.inference",
    "rmjax.generation",
    "rmjax.evaluation",
    "rmjax.training.objectives",
    "rmjax.training",
    "rmjax.training.probing",
    "rmjax.alignment",
    "rmjax.aot",
    "rmjax.reports",
    "rmjax",  # the commands
)
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "rmjax").rglob("*.py"))
}


def layer(module: str) -> int:
    """The place in `LAYERS` of the nearest package that a module is in."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS.index(module)


def imports(module: str) -> set[str]:
    """The modules of rmjax that a module imports, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in PATHS}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner if inner in PATHS else node.module} & PATHS.keys()
    return found


# `rmjax` itself names what stands in its modules, and imports it when it is used.
GRAPH = {module: imports(module) for module in PATHS if module != "rmjax"}


def test_every_package_has_a_layer():
    packages = {".".join(module.split(".")[:2]) for module in GRAPH if module.count(".") > 1}
    assert packages | {"rmjax", "rmjax.errors", "rmjax.config"} == {
        name for name in LAYERS if name.count(".") < 2
    }


def test_imports_run_downwards():
    upwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if layer(other) > layer(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_module_imports_itself_through_others():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises on a cycle
    assert set(order) >= set(GRAPH)


HEAVY = {"datasets", "flax", "grain", "matplotlib", "optax", "orbax", "pyarrow", "scipy"}
HEAVY |= {"tensorstore", "tokenizers", "torch", "transformers"}
_LOAD = """
import importlib, sys
for name in ("rmjax", "rmjax.config"):
    importlib.import_module(name)
    print(name, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The top-level packages in memory after each of two imports, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(packages) for name, *packages in lines}


def test_the_package_alone_loads_nothing(loaded):
    assert not loaded["rmjax"] & (HEAVY | {"jax", "numpy"})


def test_a_config_loads_no_heavy_library(loaded):
    assert not loaded["rmjax.config"] & HEAVY
