"""Which module may import which, and what an import may not load."""

import ast
import graphlib
import json
import subprocess
import sys

import pytest

from helpers.hf_models import save_hf
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
    "rmjax.serving",
    "rmjax.integrations",
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
import importlib, logging, sys

def show(name):
    print(name, *sorted(sys.modules))

for name in ("rmjax", "rmjax.config"):
    importlib.import_module(name)
    show(name)

import jax, rmjax
rmjax.load
show("rmjax.load")
compiled = []
logging.getLogger("jax").addHandler(type("", (logging.Handler,), {"emit": lambda _, record:
    compiled.append(record.getMessage())})())
jax.config.update("jax_log_compiles", True)
rm = rmjax.load(sys.argv[1])
rm.compare("Say hi", "hi", "no")
show("compare")
print("compiled", *(line.split()[1] for line in compiled if line.startswith("Compiling ")))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, set[str]]:
    """The modules in memory after imports and a first score, and what that compiled."""
    model = save_hf(tmp_path_factory.mktemp("model"))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(modules) for name, *modules in lines}


def test_the_package_alone_loads_nothing(loaded):
    assert not loaded["rmjax"] & (HEAVY | {"jax", "numpy"})


def test_a_config_loads_no_heavy_library(loaded):
    assert not loaded["rmjax.config"] & HEAVY


def test_a_first_score_loads_what_it_uses_alone(loaded):
    """torch is there for the tests; transformers would import it to choose a tokenizer's class."""
    at_load = {"flax", "scipy", "tensorstore"}  # of scipy what finds its parts
    unused = HEAVY - at_load | {"pandas", "scipy.special", "scipy.stats", "tensorboardX"}
    assert not loaded["rmjax.load"] & (unused | {"huggingface_hub"})
    assert not loaded["compare"] & (unused - {"tokenizers", "transformers"})
    assert {"jax", "tokenizers", "transformers"} <= loaded["compare"]


def test_a_first_score_compiles_one_program(loaded):
    """Whatever jnp does outside a compiled function would be one more."""
    assert loaded["compiled"] == {"jit(score)"}


# Each command as `python -m` runs it, in one process.
_HELP = """
import contextlib, io, json, runpy, sys
for name in sys.argv[1:]:
    sys.argv, text, status = [name, "--help"], io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            status = exit.code or 0
    print(json.dumps([name, status, text.getvalue(), sorted(sys.modules)]))
"""
COMMANDS = [
    name
    for name in GRAPH
    if name.count(".") == 1
    and name != "rmjax.__main__"
    and 'if __name__ == "__main__"' in PATHS[name].read_text()
]


def test_help_needs_no_config_and_loads_nothing_that_computes():
    assert len(COMMANDS) > 8
    done = subprocess.run(
        [sys.executable, "-c", _HELP, *COMMANDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = list(map(json.loads, done.stdout.splitlines()))
    assert [name for name, *_ in answers] == COMMANDS
    for name, status, text, modules in answers:
        assert status == 0, name
        assert f"python -m {name} " in text and "options:" in text, text
        assert not set(modules) & (HEAVY | {"jax"}), name
