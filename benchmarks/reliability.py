"""A campaign against everything: what is tried, what survives and what is lost.

    python benchmarks/reliability.py [--part=hostile] [--minutes=10] [--seed=0]

Parts: kills, signals, storage, hostile files, numbers at their edges, and length, which ends when
all of it is done or its minutes are over. Each has so many minutes. The exit status is 1 if
anything was lost. docs/reliability.md has what was measured.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Forks are of a process with no threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from campaign import hostile, kills, length, numbers, signals, storage
from campaign.ledger import Row, table
from campaign.tries import Tries, prepared
from campaign.victims import NAMES, SERVED

import rmjax.align
import rmjax.choose
import rmjax.convert
import rmjax.evaluate
import rmjax.extrapolate
import rmjax.report
import rmjax.sample
import rmjax.score
import rmjax.serve
import rmjax.train  # noqa: F401

Part = Callable[[int, float, Path, Callable[[str], None]], list[Row]]
# Those that try commands one after the other, and the others.
OF_COMMANDS: dict[str, Callable[[Tries], list[Row]]] = {
    "kills": kills.run,
    "signals": signals.run,
    "storage": storage.run,
}
OTHERS: dict[str, Part] = {
    "hostile": hostile.run,
    "numbers": numbers.run,
    "length": length.run,
}
PARTS = (*OF_COMMANDS, *OTHERS)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; else all")
    parser.add_argument("--minutes", type=float, default=10.0, help="that each part has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--command",
        action="append",
        choices=(*NAMES, SERVED),
        default=[],
        help="that is killed, stopped or given bad storage; repeatable; else all",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each try")
    args = parser.parse_args()
    show = (lambda line: print(line, flush=True)) if args.verbose else (lambda line: None)
    rows: list[Row] = []
    for name in PARTS:
        if not args.part or name in args.part:
            with tempfile.TemporaryDirectory() as scratch:
                os.environ["RMJAX_CACHE"] = f"{scratch}/cache"
                began = time.monotonic()
                given = (args.seed, args.minutes, Path(scratch), show)
                if name in OF_COMMANDS:
                    rows += OF_COMMANDS[name](prepared(*given, args.command))
                else:
                    rows += OTHERS[name](*given)
                show(f"{name}: {time.monotonic() - began:.0f} s")
    print(table(rows))
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
