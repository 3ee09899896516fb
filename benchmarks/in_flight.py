"""Scoring on a CPU: two steps at once, as `rm.score_many` computes them, against one at a time.

    python benchmarks/in_flight.py SmolLM2-135M-Instruct.Q4_1.gguf rm_bench_chat.json

Both sides are one process and one model, in turn, in float32. One at a time leaves steps as the
planner made them; two at once divides an odd one (`Planner.even`). Prints medians of the seconds,
the cores that were busy (seconds of the processor for each that passed), the token positions
computed, and the ratio. Scores that are more than 1e-5 apart are an error.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from material import judged_pairs, make_model
from rich.console import Console
from score_vs_transformers import conversations
from timing import load_average

import rmjax
from rmjax.inference.planner import Planner
from rmjax.inference.scorer import Scorer
from rmjax.runtime import in_flight

_TOLERANCE = 1e-5
_EVEN, _AT_ONCE = Planner.even, in_flight.ON_CPU


class Round(NamedTuple):
    """Seconds, seconds of the processor, token positions, scores."""

    seconds: float
    processor: float
    positions: int
    scores: list[float]


def scored(rm: Scorer, asked: Any, at_once: int) -> Round:
    """Scores a set, so many steps at once."""
    in_flight.ON_CPU = at_once
    Planner.even = _EVEN if at_once > 1 else lambda self, steps: list(steps)
    before, began, busy = rm.work.padded_tokens, time.perf_counter(), time.process_time()
    scores = [score.value for score in rm.score_many(asked)]
    return Round(
        time.perf_counter() - began,
        time.process_time() - busy,
        rm.work.padded_tokens - before,
        scores,
    )


def main() -> None:
    """Measures sets of several sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="RM-Bench's chat domain")
    parser.add_argument("--conversations", default="2,4,16", help="of a set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    every = conversations(judged_pairs(args.data))
    rm = rmjax.load(str(make_model(args.weights, ["reward"], args.workdir)))
    rm.progress, apart = False, 0.0
    console.print(f"load average {load_average()}")
    for count in map(int, args.conversations.split(",")):
        asked = every[:count]
        for at_once in (1, _AT_ONCE):
            scored(rm, asked, at_once)  # compiles
        rounds = [(scored(rm, asked, 1), scored(rm, asked, _AT_ONCE)) for _ in range(args.rounds)]
        for side, name in enumerate(("one at a time", "two at once")):
            of_side = [pair[side] for pair in rounds]
            seconds = statistics.median(r.seconds for r in of_side)
            cores = statistics.median(r.processor / r.seconds for r in of_side)
            console.print(
                f"{count} conversations, {name}: {seconds:.2f} s, {cores:.2f} cores, "
                f"{of_side[0].positions:,} positions"
            )
        ratio = statistics.median(one.seconds / two.seconds for one, two in rounds)
        console.print(f"  {ratio:.2f} times as fast")
        apart = max(
            apart, *(float(np.abs(np.subtract(a.scores, b.scores)).max()) for a, b in rounds)
        )
    console.print(f"scores at most {apart:.1e} apart; load average {load_average()}")
    sys.exit(apart > _TOLERANCE)


if __name__ == "__main__":
    main()
