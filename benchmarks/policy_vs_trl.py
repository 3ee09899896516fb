"""Policies trained on the CPU: rmjax against TRL's DPOTrainer and SFTTrainer, on the same pairs.

    python benchmarks/policy_vs_trl.py dpo GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/policy_vs_trl.py sft GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/policy_vs_trl.py dpo          # a tiny random model on made-up pairs: a minute

Both train the same weights on the same tokens in the same steps, in float32 with the same AdamW, on
the same cores, nothing recomputed in the backward pass; `sft` imitates the chosen responses.
Printed are both losses of each step, how far they are apart at most, and the median ratio of the
times of a step without the first. The reference's log-probabilities are computed before the first
step on both sides and do not count. TRL gets each step sorted by length. The sides run one after
the other, so take `--clock=cpu` on a busy machine. A tiny model compares the losses alone: its
times are those of what surrounds it. Needs `rmjax[bench]`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from material import Answered, made_up_pairs, make_language_model, read_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Piece, Side, load_average, rate, speedup
from trainers import make_batches, policy_steps, rmjax_side, trl_policy_side

from rmjax.config import Config, DataConfig, OptimizerConfig, PreferenceConfig


def write_rows(task: str, pairs: list[Answered], path: Path) -> None:
    """The pairs as rmjax reads them, one of each prompt; for `sft` the chosen responses alone."""
    distinct = {json.dumps(pair.prompt): pair for pair in pairs}
    with open(path, "w", encoding="utf-8") as file:
        for prompt, (chosen, rejected) in distinct.values():
            row = {"prompt": prompt, "response": chosen}
            if task == "dpo":
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def make_config(model: Path, data: Path, args: argparse.Namespace) -> Config:
    """The run; a step has as many responses for `sft` as it has pairs for `dpo`."""
    pairs = args.task == "dpo"
    return Config(
        workdir="unused",
        data=DataConfig(
            train=str(data), attributes=(), max_length=args.length, row_length=2 * args.length
        ),
        init=str(model),
        objective=args.task,
        preference=PreferenceConfig(beta=args.beta),
        batch_size=2 * args.pairs if pairs else args.pairs,
        steps=args.steps,
        remat="none",
        dtype="float32",
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=0),
    )


def main() -> None:
    """Runs both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=["dpo", "sft"])
    parser.add_argument("weights", nargs="?", default="", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", nargs="?", type=Path, help="hh-rlhf's pairs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--length", type=int, default=256, help="most tokens of a sample")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--micro", type=int, default=4, help="TRL's micro-batch, in pairs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if bool(args.weights) != bool(args.data):
        parser.error("give both weights and data, or neither for a tiny random model")
    run(args)


def run(args: argparse.Namespace) -> None:
    """The benchmark."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    model = make_language_model(args.weights, args.workdir)
    data = args.workdir / f"policy_{args.task}.jsonl"
    pairs = read_pairs(args.data) if args.data else made_up_pairs(args.steps * args.pairs)
    write_rows(args.task, pairs, data)
    config = make_config(model, data, args)
    batches, plan, *_ = make_batches(config)
    told: dict[str, tuple[Any, dict[str, Any]]] = {
        "TRL": (
            trl_policy_side,
            dict(
                task=args.task,
                model=str(model),
                steps=policy_steps(args.task, batches.data, plan),
                micro=args.micro,
                beta=args.beta,
                optimizer=config.optimizer,
            ),
        ),
        "rmjax": (rmjax_side, dict(config=config)),
    }
    cores = set(sorted(os.sched_getaffinity(0))[-args.cores :])
    sides: dict[str, list[Piece]] = {}
    for name, (make, options) in told.items():
        side = Side(make, cores, clock=args.clock, **options)
        sides[name] = [side(step) for step in range(args.steps)]
        side.close()
    console, table = Console(highlight=False), Table("step", *sides, "difference")
    theirs, ours = sides.values()
    apart = [a.value - b.value for a, b in zip(ours, theirs)]
    for step, (a, b, difference) in enumerate(zip(theirs, ours, apart), start=1):
        table.add_row(f"{step}", f"{a.value:.6f}", f"{b.value:.6f}", f"{difference:+.1e}")
    console.print(table)
    console.print(f"largest difference {max(map(abs, apart)):.1e}")
    amounts = [args.pairs] * (args.steps - 1)
    unit = "pairs" if args.task == "dpo" else "responses"
    speeds = [f"{name} {rate(found[1:], amounts):.2f}" for name, found in sides.items()]
    console.print(f"{unit}/s: {', '.join(speeds)}; rmjax is", end=" ")
    console.print(f"{speedup(theirs[1:], ours[1:]):.2f} times as fast")
    console.print(f"{args.cores} cores, {args.clock} clock; load average {load_average()}")


if __name__ == "__main__":
    main()
