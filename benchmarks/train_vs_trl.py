"""Training on the CPU: rmjax against TRL's RewardTrainer, or transformers' five-label regression.

    python benchmarks/train_vs_trl.py pairs GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/train_vs_trl.py dialogues GGUF topical_chat_ratings.jsonl

Measures samples a second of whole steps (forward, backward, AdamW): pairs with a Bradley-Terry
loss, or rated replies to dialogues. Both sides see the same tokens in the same steps, with the same
weights, in float32 on the same cores, nothing recomputed in the backward pass; they take turns,
step by step. On a busy machine `--cores=1 --clock=cpu` counts the seconds a process computed, not
those it waited. The other side gets each step sorted by length (what length grouping does, at its
best) in micro-batches of the best of several sizes, which is looked for first. The losses are
printed: both sides do the same thing. Needs `rmjax[bench]`.
"""

import argparse
import os
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from material import RATINGS, make_model, read_pairs, write_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Side, in_turn, load_average, rate, speedup
from trainers import make_batches, rmjax_side, torch_side, torch_steps

from rmjax.config import Config, DataConfig

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m_regression.py"


class Task(NamedTuple):
    """Objective, columns, most tokens of a sample, responses a step."""

    objective: str
    attributes: tuple[str, ...]
    length: int
    batch: int


TASKS = {
    "pairs": Task("bradley_terry", ("reward",), 512, 64),
    "dialogues": Task("regression", RATINGS, 1056, 24),
}


def make_config(task: str, model: Path, data: Path, steps: int, batch: int) -> Config:
    """SmolLM2's config with the task's data; `batch_size` is in responses."""
    told = TASKS[task]
    config: Config = runpy.run_path(str(CONFIG))["get_config"]()
    config.init, config.model, config.steps, config.epochs = str(model), None, steps, 0.0
    config.data = DataConfig(
        train=str(data),
        attributes=told.attributes,
        label_range=(0.0, 5.0),
        max_length=told.length,
    )
    config.objective, config.batch_size = told.objective, batch or told.batch
    config.eval_every = config.checkpoint_every = 0
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-5, "constant"
    config.optimizer.warmup_steps = 0
    return config


def main() -> None:
    """Looks for the other side's best micro-batch, then measures both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="the pairs or the dialogues")
    parser.add_argument("--steps", type=int, default=3, help="to measure, after the first")
    parser.add_argument("--sizes", default="1,2,4,8", help="micro-batches of the other side")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--batch", type=int, default=0, help="responses a step")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    run(args)


def run(args: argparse.Namespace) -> None:
    """The benchmark."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    model = make_model(args.weights, TASKS[args.task].attributes, args.workdir)
    data = args.data
    if args.task == "pairs":
        data = args.workdir / "pairs.jsonl"
        write_pairs(read_pairs(args.data), data)
    config = make_config(args.task, model, data, args.steps + 1, args.batch)
    batches, plan, *_ = make_batches(config)
    steps = torch_steps(args.task, batches.data, plan)
    cores = set(sorted(os.sched_getaffinity(0))[-args.cores :])
    sizes = [int(size) for size in args.sizes.split(",")]
    told: dict[str, Any] = dict(
        clock=args.clock,
        task=args.task,
        model=str(model),
        steps=steps,
        optimizer=config.optimizer,
    )
    console, table = Console(highlight=False), Table("", "samples/s", "loss of the first step")
    tried = {}
    for size in sizes:
        side = Side(torch_side, cores, micro=size, **told)
        tried[size] = side(0)
        side.close()
        console.print(f"micro-batch {size}: {len(steps[0]) / tried[size].seconds:.2f} samples/s")
    best = min(tried, key=lambda size: tried[size].seconds)
    other = "TRL" if args.task == "pairs" else "transformers"
    sides = {
        f"{other}, micro-batch {best}": Side(torch_side, cores, micro=best, **told),
        "rmjax": Side(rmjax_side, cores, clock=args.clock, config=config),
    }
    pieces = in_turn(sides, range(args.steps + 1))
    amounts = [len(step) for step in steps]
    for name, found in pieces.items():
        table.add_row(name, f"{rate(found[1:], amounts[1:]):.2f}", f"{found[0].value:.6f}")
    console.print(table)
    theirs, ours = pieces.values()
    console.print(f"rmjax is {speedup(theirs[1:], ours[1:]):.2f} times as fast")
    console.print("losses:", *[f"{a.value:.5f}/{b.value:.5f}" for a, b in zip(theirs, ours)])
    console.print(f"{args.cores} cores, {args.clock} clock; load average {load_average()}")


if __name__ == "__main__":
    main()
