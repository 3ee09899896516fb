"""A policy that learns from its own samples, on the CPU: `rmjax.align` against TRL's trainers.

    python benchmarks/align_vs_trl.py equal rloo GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/align_vs_trl.py speed grpo GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/align_vs_trl.py equal rloo    # a tiny random model, made-up prompts: a minute

`equal` runs `rmjax.align` for some steps of several updates each, hands its samples to TRL's
RLOOTrainer or GRPOTrainer, which rewards and learns from them by its own code, and compares the
losses and gradients of all updates. AdamW is told b1 = 0: its first moment is the gradient then.
A difference of losses is relative to the mean absolute advantage, since a loss can be 0; one of
gradients is the norm of the difference of a tensor over the norm of TRL's, the largest of all
tensors. Beyond 1e-4 the exit status is 1.

`speed` runs both as users do: sample, reward, learn. Both have the same weights, prompts, samples a
prompt, tokens a sample (no end token ends one), reward (a function of the text), method and AdamW,
in float32, on the same cores; one update a step, and nothing is recomputed in the backward pass. A
step is measured from one reward to the next, the sides take turns, and the first step of each does
not count. TRL gets the best of several micro-batches, which is looked for first. Not equal: TRL
computes no log-probabilities that `grpo` does not need, while rmjax reports KL and entropy of every
step and writes its samples. On a busy machine take `--clock=cpu`. Needs `rmjax[bench]`.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from aligners import rmjax_loop, rmjax_updates, trl_loop, trl_updates
from material import made_up_pairs, make_language_model, read_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Loop, Piece, Side, in_turn, load_average, rate, speedup

from rmjax.config import (
    AlignConfig,
    DataConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
)

_TOLERANCE = 1e-4
_REWARD = Path(__file__).with_name("aligners.py")


def write_prompts(args: argparse.Namespace, path: Path) -> None:
    """The prompts as both sides read them, each once."""
    pairs = read_pairs(args.data) if args.data else made_up_pairs(64)
    distinct = {json.dumps(pair.prompt): pair.prompt for pair in pairs}
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in distinct.values()))


def make_config(model: Path, prompts: Path, args: argparse.Namespace) -> AlignConfig:
    """The run."""
    equal = args.task == "equal"
    return AlignConfig(
        workdir=str(args.workdir / f"align_{args.method}"),
        data=DataConfig(
            train=str(prompts),
            attributes=(),
            max_length=args.prompt + args.tokens,
            row_length=args.prompt + args.samples * args.tokens,  # a prompt with its samples
        ),
        init=str(model),
        objective=args.method,
        rollout=RolloutConfig(n=args.samples, max_tokens=args.tokens),
        rewards={"words": RewardConfig(function=f"{_REWARD}:reward")},
        policy_gradient=PolicyGradientConfig(
            kl=args.kl,
            minibatches=args.minibatches if equal else 1,
            passes=args.passes if equal else 1,
        ),
        batch_size=args.prompts * args.samples,
        steps=args.steps + (not equal),
        remat="none",
        dtype="float32",
        optimizer=OptimizerConfig(
            learning_rate=args.learning_rate,
            warmup_steps=0,
            b1=0.0 if equal else 0.9,
            clip_norm=1e6 if equal else 1.0,
        ),
    )


# ---- equal --------------------------------------------------------------------------------------


def compare(config: AlignConfig, args: argparse.Namespace, console: Console) -> bool:
    """The losses and gradients of both sides; whether they agree."""
    gradients = args.workdir / "gradients"
    shutil.rmtree(gradients, ignore_errors=True)
    gradients.mkdir()
    cores = args.cores
    ours = Side(rmjax_updates, cores, config=config, gradients=gradients)
    losses = ours(None).value
    ours.close()
    theirs = Side(trl_updates, cores, config=config, gradients=gradients)
    found = theirs(None).value
    theirs.close()
    shutil.rmtree(gradients)
    table = Table("step", "update", "rmjax", "TRL", "difference", "of the gradient", "clipped")
    apart = [
        (abs(loss - update.loss) / update.advantage, update.gradient)
        for loss, update in zip(losses, found, strict=True)
    ]
    for number, (loss, update, (of_loss, of_gradient)) in enumerate(zip(losses, found, apart)):
        step, part = divmod(number, args.minibatches * args.passes)
        cells = [f"{loss:.6f}", f"{update.loss:.6f}", f"{of_loss:.1e}", f"{of_gradient:.1e}"]
        table.add_row(f"{step + 1}", f"{part + 1}", *cells, f"{100 * update.clipped:.1f} %")
    console.print(table)
    largest = np.asarray(apart).max(0)
    console.print(f"largest difference: of a loss {largest[0]:.1e}, of a gradient {largest[1]:.1e}")
    return bool((largest <= _TOLERANCE).all())


# ---- speed --------------------------------------------------------------------------------------


def measure(config: AlignConfig, args: argparse.Namespace, console: Console) -> bool:
    """Looks for TRL's best micro-batch, then measures both and prints a table."""
    told: dict[str, Any] = dict(clock=args.clock, config=config)
    tokens = config.batch_size * args.tokens
    sizes, tried = [int(size) for size in args.micro.split(",")], {}
    for size in sizes if len(sizes) > 1 else []:
        side = Loop(trl_loop, args.cores, micro=size, **told)
        tried[size] = side(None).seconds
        side.close()
        console.print(f"TRL, micro-batches of {size}: {tried[size]:.1f} s a step")
    best = min(sizes, key=lambda size: tried.get(size, 0))
    name = f"TRL, micro-batches of {best}"
    sides: dict[str, Side] = {
        name: Loop(trl_loop, args.cores, micro=best, **told),
        "rmjax": Loop(rmjax_loop, args.cores, **told),
    }
    pieces = {side: found[1:] for side, found in in_turn(sides, range(args.steps)).items()}
    table = Table("", "s a step", "sampling", "scoring", "update and rest", "sampled tokens/s")
    for side, found in pieces.items():
        counts = [piece.value["tokens"] for piece in found]
        assert counts == [tokens] * len(found), f"{side}: {counts} tokens, not {tokens}"
        table.add_row(side, *of_parts(found), f"{rate(found, counts):.0f}")
    console.print(table)
    console.print(f"rmjax is {speedup(*pieces.values()):.2f} times as fast")
    return True


def of_parts(pieces: list[Piece]) -> list[str]:
    """Medians: of a step, of its sampling, of its scoring, and of what is left of it."""
    named = [[p.value["seconds"][part] for part in ("sampling", "scoring")] for p in pieces]
    columns = [[p.seconds, *parts, p.seconds - sum(parts)] for p, parts in zip(pieces, named)]
    return [f"{seconds:.1f}" for seconds in np.median(columns, axis=0)]


def main() -> None:
    """Does one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=["equal", "speed"])
    parser.add_argument("method", choices=["rloo", "grpo"])
    parser.add_argument("weights", nargs="?", default="", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", nargs="?", type=Path, help="hh-rlhf's pairs")
    parser.add_argument("--steps", type=int, default=0, help="2 for `equal`, 4 for `speed`")
    parser.add_argument("--minibatches", type=int, default=2, help="of a step, for `equal`")
    parser.add_argument("--passes", type=int, default=1, help="through them, for `equal`")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt", type=int, default=256, help="most tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument("--kl", type=float, help="TRL's beta; each method's own, unless given")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--micro", default="4,8,16", help="TRL's micro-batches to try")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if bool(args.weights) != bool(args.data):
        parser.error("give both weights and data, or neither for a tiny random model")
    args.cores = set(sorted(os.sched_getaffinity(0))[-args.cores :])
    args.steps = args.steps or {"equal": 2, "speed": 4}[args.task]
    task: Callable[..., bool] = {"equal": compare, "speed": measure}[args.task]
    args.workdir.mkdir(parents=True, exist_ok=True)
    prompts, console = args.workdir / "align_prompts.jsonl", Console(highlight=False)
    write_prompts(args, prompts)
    config = make_config(make_language_model(args.weights, args.workdir), prompts, args)
    shutil.rmtree(config.workdir, ignore_errors=True)
    well = task(config, args, console)
    console.print(f"{len(args.cores)} cores, {args.clock} clock; load average {load_average()}")
    sys.exit(not well)


if __name__ == "__main__":
    main()
