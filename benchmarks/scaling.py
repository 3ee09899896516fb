"""The tables of docs/scaling.md: every preset compiled for chips that are not there.

    python benchmarks/scaling.py [NAME ...]

Needs `rmjax[aot]`, and `rmjax[cuda13]` for the rows of GPUs, in this or (PYTHON_GPU=...) another
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
ROWS = ["--tokens=4096"]  # 128 rows of 4,096, one response each
# 128 responses, or pairs, in the rows that a run chooses for them: four or eight prompts fill one.
HELPSTEER2 = ["--tokens=555", "--prompt=180", "--responses=2", "--config.data.max_length=3840"]
FULL = "remat=full"
# Name, config, topology, slices, what the config must be told for it, and what rows hold.
PRESETS = [
    ("70B", "llama70b_regression", "v5p:4x4x4", 1, [], HELPSTEER2),
    ("70B", "llama70b_regression", "v5p:4x4x4", 1, ["mesh.context=1", "mesh.tensor=1"], ROWS),
    ("8B", "llama8b_regression", "v5e:4x4", 1, ["rows_per_device=2"], ROWS),
    ("8B", "llama8b_regression", "v6e:2x4", 1, ["remat=attention", "rows_per_device=2"], ROWS),
    ("8B", "llama8b_regression", "v5p:2x2x1", 1, ["remat=dots", "rows_per_device=4"], ROWS),
    ("8B", "llama8b_regression", "v5e:4x4", 1, [], HELPSTEER2),
    ("70B, DPO", "llama70b_dpo", "v5p:4x4x4", 1, [], HELPSTEER2),
    ("70B, SFT", "llama70b_sft", "v5p:4x4x4", 1, [], HELPSTEER2),
    ("8B, DPO", "llama8b_dpo", "v5e:4x4", 1, [], HELPSTEER2),
    ("8B, SFT", "llama8b_sft", "v5e:4x4", 1, [], HELPSTEER2),
    ("70B", "llama70b_regression", "v5p:2x4x4", 1, [FULL, "mesh.context=1", "mesh.tensor=1"], ROWS),
    ("70B", "llama70b_regression", "v5e:16x16", 1, [FULL, "mesh.context=1"], ROWS),
    ("70B", "llama70b_regression", "v6e:8x8", 1, [FULL, "mesh.context=1", "mesh.tensor=1"], ROWS),
    ("405B", "llama405b_regression", "v5p:4x4x8", 1, [], ROWS),
    ("340B", "llama405b_regression.py:340b", "v5p:4x4x8", 1, [], ROWS),
    (
        "70B",
        "llama70b_regression",
        "v5p:4x4x4",
        2,
        ["mesh.data=2", "mesh.context=1", "mesh.tensor=1"],
        ROWS,
    ),
    ("8B", "llama8b_regression", "h100:8", 1, ["rows_per_device=2"], ROWS),
    (
        "70B",
        "llama70b_regression",
        "h100:8x8",
        1,
        [FULL, "mesh.context=1", "mesh.tensor=8"],
        ROWS,
    ),
    ("405B", "llama405b_regression", "v6e:16x16", 1, ["mesh.tensor=4", "mesh.context=4"], ROWS),
]
HEAD = (
    "| model | topology | mesh | load | at once | remat | state | peak | has "
    "| s a step | floor | serial | MFU |\n|" + "---|" * 13
)


def line(
    name: str, config: str, topology: str, slices: int, told: list[str], load: list[str]
) -> str:
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
            *load,
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
    cells = [
        name,
        where,
        mesh,
        "HelpSteer2" if load is HELPSTEER2 else "rows",
        f"{report['microbatches']} x {report['rows']}",
        report["remat"],
    ]
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
    parser.add_argument("names", nargs="*", help="models, or topologies; all if not given")
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    for name, *preset in PRESETS:
        if not arguments.names or {name, preset[1]} & set(arguments.names):
            print(line(name, *preset), flush=True)


if __name__ == "__main__":
    main()
