"""CPU seconds until something happens: imports, the first score, `--help`, the first step of a run.

    python -m rmjax.train --config=configs/quickstart.py
    python benchmarks/startup.py runs/quickstart [--against=OTHER_CHECKOUT] [--repeat=5]

Every measurement is a process of its own. What is counted is the time that its threads compute,
user and system, so that other programs on the machine add little, and what waits for a disk
nothing; medians of `--repeat` rounds are printed. With `--against` another checkout of the project
is measured in turns with this one. Without a cache of programs everything is compiled; with one,
what the process before it compiled is read, however short that took. Of `rmjax.train` all of a run
of one step is counted, with its evaluation and its checkpoint.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parent.parent
_COMMANDS = ("train", "align", "probe", "compile_check", "evaluate", "score", "sample", "choose")
_COMMANDS += ("convert", "extrapolate", "report")
# What has been computed when each is said; the second pair has rows of another length.
_SCORE = """
import json, resource, sys

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

import rmjax
at = {"import rmjax": seconds()}
rmjax.load
at["rmjax.load, not called"] = seconds()
rm = rmjax.load(sys.argv[1], **json.loads(sys.argv[2]))
at["a model loaded"] = seconds()
rm.compare("Say hi", "hi", "no")
at["first compare"] = seconds()
rm.compare("Say hi " * 20, "hi", "no")
at["second compare"] = seconds()
print(json.dumps(at))
"""


def measured(checkout: Path, run: str, options: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """One round: names and CPU seconds, those of the first score from the process's start."""
    programs = scratch / checkout.name / "compiled"
    off = {"JAX_COMPILATION_CACHE_DIR": ""}
    on = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    yield "python -c pass", cpu_of(checkout, ["-c", "pass"])[0]
    for name, cache in (("", off), (", programs in the cache", on)):
        _, text = cpu_of(checkout, ["-c", _SCORE, run, options], cache)
        at = json.loads(text.splitlines()[-1])
        if not name:
            for stage in ("import rmjax", "rmjax.load, not called", "a model loaded"):
                yield stage, at[stage]
        yield f"first compare{name}", at["first compare"]
        yield f"a compare of another length{name}", at["second compare"] - at["first compare"]
    config = ["--config=configs/quickstart.py", "--config.steps=1", "--config.epochs=0"]
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = ["-m", "rmjax.train", *config, f"--config.workdir={directory}/run"]
        yield "rmjax.train, one step", cpu_of(checkout, command, on)[0]
    for command in _COMMANDS:
        yield f"rmjax.{command} --help", cpu_of(checkout, ["-m", f"rmjax.{command}", "--help"])[0]


def cpu_of(
    checkout: Path, arguments: list[str], variables: dict[str, str] | None = None
) -> tuple[float, str]:
    """CPU seconds of `python ARGUMENTS` in a checkout, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)} | (variables or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, done.stdout


def main() -> None:
    """Measures in rounds and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run, or another model that rmjax.load takes")
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--options", default="{}", metavar="JSON", help="arguments of rmjax.load")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    args = parser.parse_args()
    run = str(Path(args.run).resolve()) if Path(args.run).exists() else args.run
    sides = [_ROOT, *([args.against.resolve()] if args.against else [])]
    found: list[dict[str, list[float]]] = [defaultdict(list) for _ in sides]
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.repeat + 1):  # the first round warms the disk and the caches
            for side, seconds_of in zip(sides, found):
                for name, seconds in measured(side, run, args.options, Path(scratch)):
                    if number:
                        seconds_of[name].append(seconds)
    table = Table("CPU seconds", *(["here", "there", "ratio"] if args.against else ["here"]))
    for name in found[0]:
        middle = [statistics.median(seconds_of[name]) for seconds_of in found]
        ratio = [f"{middle[1] / middle[0]:.1f}"] if args.against else []
        table.add_row(name, *(f"{seconds:.2f}" for seconds in middle), *ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
