"""The table of docs/scale.md: every preset compiled for chips that are not there.

    python benchmarks/scaling.py [--tokens=4096] [NAME ...]

Needs `rmjax[aot]`, and `rmjax[cuda12]` for the rows of GPUs, in this or (PYTHON_GPU=...) another
environment. Prints one line of Markdown a preset as soon as it is compiled. Takes about a minute a
line on two quiet cores.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FULL = "remat=full"
# Name, config, topology, slices and what the config must be told for it.
PRESETS = [
    ("8B", "llama8b_regression", "v5p:2x2x1", 1, ["rows_per_device=4", "remat=dots"]),
    ("8B", "llama8b_regression", "v6e:2x4", 1, ["mesh.tensor=2", "rows_per_device=2"]),
    ("8B", "llama8b_regression", "v5e:4x4", 1, ["mesh.tensor=2"]),
    ("8B", "llama8b_regression", "h100:8", 1, ["rows_per_device=2"]),
    ("70B", "llama70b_regression", "v5p:2x4x4", 1, [FULL, "rows_per_device=2"]),
    ("70B", "llama70b_regression", "v5p:4x4x4", 1, []),
    ("70B", "llama70b_regression", "v5p:4x4x4", 1, [FULL]),
    ("70B", "llama70b_regression", "v5p:4x4x4", 1, [FULL, "mesh.tensor=2", "rows_per_device=2"]),
    ("70B", "llama70b_regression", "v6e:8x8", 1, [FULL, "mesh.tensor=2"]),
    ("70B", "llama70b_regression", "v5e:16x16", 1, [FULL, "mesh.tensor=4"]),
    ("70B", "llama70b_regression", "v5p:4x4x4", 2, [FULL, "mesh.data=2"]),
    ("70B", "llama70b_regression", "h100:8x8", 1, [FULL, "mesh.tensor=8"]),
    ("340B", "llama405b_regression.py:340b", "v5p:4x4x8", 1, []),
    ("405B", "llama405b_regression", "v5p:4x4x8", 1, []),
    ("405B", "llama405b_regression", "v6e:16x16", 1, ["mesh.tensor=4", "mesh.context=4"]),
]
HEAD = (
    "| model | topology | mesh | rows | remat | state | peak | has "
    "| s a step | floor | serial | MFU |\n|" + "---|" * 12
)


def line(name: str, config: str, topology: str, slices: int, told: list[str], tokens: int) -> str:
    """Compiles one preset and says what came of it."""
    gpu = topology.startswith("h")
    python = os.environ.get("PYTHON_GPU", sys.executable) if gpu else sys.executable
    path = config if ":" in config else f"{config}.py"
    result = subprocess.run(
        [
            python,
            "-m",
            "rmjax.compile_check",
            f"--config=configs/{path}",
            f"--topology={topology}",
            f"--slices={slices}",
            f"--tokens={tokens}",
            "--json",
            *(f"--config.{setting}" for setting in told),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    where = f"{topology}{f' x {slices}' if slices > 1 else ''}"
    if not result.stdout:
        return f"| {name} | {where} | {result.stderr.strip().splitlines()[-1][:200]} |"
    (report,) = json.loads(result.stdout)
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    gib = 2**30
    state = (report["parameters"] + report["optimizer"] + report["gradients"]) / gib
    cells = [name, where, mesh, f"{report['microbatches']} x {report['rows']}", report["remat"]]
    cells += [f"{state:.1f}", f"{report['peak'] / gib:.1f}", f"{report['memory'] / gib:.1f}"]
    found = report["prediction"]
    if found is None:
        why = "not readable" if report["fits"] else "does not fit"
        return "| " + " | ".join([*cells, why, "", "", ""]) + " |"
    cells += [f"{found['step']:.2f}", f"{found['floor']:.2f}", f"{found['serial']:.2f}"]
    return "| " + " | ".join([*cells, f"{found['mfu']:.1%}"]) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="mean tokens of a response")
    parser.add_argument("names", nargs="*", help="models, or topologies; all if not given")
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    for name, config, topology, slices, told in PRESETS:
        if not arguments.names or {name, topology} & set(arguments.names):
            print(line(name, config, topology, slices, told, arguments.tokens), flush=True)


if __name__ == "__main__":
    main()
