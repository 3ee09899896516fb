"""Loss curves and held-out accuracy on the CPU: rmjax against TRL's RewardTrainer, same pairs.

    python benchmarks/curves_vs_trl.py GGUF hh_harmless_base_test.jsonl.gz

Both train the same weights and the same head on the same pairs in the same steps, in float32, with
the same AdamW (decay, clipping, falling learning rate), then judge the same held-out pairs. rmjax
does it as a user does, by `rmjax.train` and `rmjax.load`; TRL's trainer gets the tokens that rmjax
has made, in rmjax's order.

The differences are held to a tolerance, beyond which the exit status is 1. The numbers are written
to `curves_vs_trl.json` and `.md` in the working directory. Needs `rmjax[bench]`.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from material import make_model, read_pairs, write_pairs
from rich.console import Console
from timing import Piece, Side, load_average
from trainers import torch_steps, trainer_arguments

from rmjax.config import Config, DataConfig, OptimizerConfig
from rmjax.evaluation.metrics import wilson_interval
from rmjax.models.presets import smollm2_135m

# Of the loss, which begins near log 2: over the first ten steps, and over all.
TOLERANCES = (1e-5, 1e-4)
_FIRST = 10
_SCORED = 4  # pairs that the other side scores at once


def make_config(model: Path, data: Path, args: argparse.Namespace) -> Config:
    """The run; a fifth of the prompts is held out."""
    return Config(
        workdir=str(args.workdir / "curves"),
        data=DataConfig(
            train=str(data),
            hold_out=0.2,
            attributes=("reward",),
            max_length=args.length,
            row_length=2 * args.length,
        ),
        init=str(model),
        model=smollm2_135m(),
        objective="bradley_terry",
        batch_size=2 * args.pairs,
        steps=args.steps,
        remat="none",
        rows_per_device=2,
        dtype="float32",
        optimizer=OptimizerConfig(
            learning_rate=args.learning_rate, schedule="linear", warmup_steps=0
        ),
    )


def rmjax_side(config: Config) -> Callable[[None], Piece]:
    """A run of `rmjax.train`, and `rmjax.load` of it."""
    import time

    import rmjax
    from rmjax.train import train

    def work(_: None) -> Piece:
        started = time.perf_counter()
        shutil.rmtree(config.workdir, ignore_errors=True)
        train(config)
        _, held = load(config)
        found = read_metrics(Path(config.workdir))
        rm = rmjax.load(config.workdir)
        rows = [json.loads(line) for line in Path(config.data.train).read_bytes().splitlines()]
        talks = [
            [*rows[n - 1]["prompt"], {"role": "assistant", "content": rows[n - 1][name]}]
            for n in held.rows[::2].tolist()
            for name in ("chosen", "rejected")
        ]
        scores = np.asarray([score.value for score in rm.score_many(talks)])
        return Piece(time.perf_counter() - started, found | {"margins": scores[::2] - scores[1::2]})

    return work


def read_metrics(workdir: Path) -> dict[str, list[float]]:
    """Each step's loss, gradient norm and learning rate, of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {name: [line[name] for line in steps] for name in ("loss", "grad_norm", "learning_rate")}


def load(config: Config) -> tuple[Any, Any]:
    """The run's training and held-out pairs, as tokens."""
    from rmjax.checkpoints.pretrained import open_pretrained
    from rmjax.training.datasets import load_data
    from rmjax.training.experiment import pick_tokenizer

    source = open_pretrained(config.init)
    return load_data(config, pick_tokenizer(config, source, source.decoder.vocab_size), share=True)


def trl_side(config: Config, micro: int) -> Callable[[None], Piece]:
    """TRL's RewardTrainer; one call of `train`."""
    import time

    import datasets
    import torch
    import transformers
    from trl.trainer.reward_config import RewardConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.reward_trainer import RewardTrainer  # pyright: ignore[reportMissingImports]

    from rmjax.data.planning import plan_steps

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    data, held = load(config)
    plan = plan_steps(data, batch_size=config.batch_size, seed=config.seed, steps=config.steps)
    rows = [row for step in torch_steps("pairs", data, plan) for row in step]
    pairs = config.batch_size // 2
    assert len(rows) == pairs * config.steps
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.init, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.init)
    arguments = trainer_arguments(config.optimizer, config.steps, micro, pairs // micro)
    trainer = RewardTrainer(
        network,
        RewardConfig(**arguments, max_length=None),
        None,
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )

    def work(_: None) -> Piece:
        started = time.perf_counter()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = ("loss", "grad_norm", "learning_rate")
        found = {name: [entry[name] for entry in logs] for name in names}
        sequences = [held.sequence(i).tolist() for i in range(len(held))]
        scores = torch_scores(network, tokenizer.pad_token_id, sequences)
        return Piece(time.perf_counter() - started, found | {"margins": scores[::2] - scores[1::2]})

    return work


def torch_scores(network: Any, pad: int, sequences: Sequence[list[int]]) -> np.ndarray:
    """The rewards of sequences, in batches of about the same length, padded on the right."""
    import torch

    network.eval()
    scores = np.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), 2 * _SCORED):
        members = order[start : start + 2 * _SCORED]
        longest = max(len(sequences[i]) for i in members)
        padded = [sequences[i] + [pad] * (longest - len(sequences[i])) for i in members]
        mask = [[1] * len(sequences[i]) + [0] * (longest - len(sequences[i])) for i in members]
        with torch.no_grad():
            found = network(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits
        scores[members] = found[:, 0].numpy()
    return scores


# ---- what is said of them -----------------------------------------------------------------------


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far apart two sides are: their losses by step, and their decisions on held-out pairs."""
    apart = np.abs(np.subtract(ours["loss"], theirs["loss"]))
    a, b = np.asarray(ours["margins"]), np.asarray(theirs["margins"])
    return {
        "largest difference of the loss, first steps": float(apart[:_FIRST].max()),
        "largest difference of the loss, all steps": float(apart.max()),
        "largest relative difference of the gradient's norm": float(
            np.max(np.abs(np.divide(ours["grad_norm"], theirs["grad_norm"]) - 1))
        ),
        "largest difference of the learning rate": float(
            np.abs(np.subtract(ours["learning_rate"], theirs["learning_rate"])).max()
        ),
        "largest difference of a held-out margin": float(np.abs(a - b).max()),
        "held-out pairs decided differently": int((np.sign(a) != np.sign(b)).sum()),
    }


def accuracy(margins: Sequence[float]) -> tuple[float, float, float]:
    """The share of pairs ordered as people did, ties one half, and its 95 % interval."""
    right = (1 + np.sign(margins)).sum() / 2
    return (float(right / len(margins)), *wilson_interval(right, len(margins)))


def report(sides: dict[str, Piece], args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The numbers in JSON's types, and as tables in markdown; the first side is rmjax."""
    names, values = list(sides), [piece.value for piece in sides.values()]
    losses = np.asarray([value["loss"] for value in values])
    lines = ["| step | " + " | ".join(names) + " | difference |", "|---|---|---|---|"]
    for step, (ours, theirs) in enumerate(losses.T, 1):
        lines.append(f"| {step} | {ours:.6f} | {theirs:.6f} | {ours - theirs:+.1e} |")
    lines += ["", "| | held-out accuracy (95 %) | pairs |", "|---|---|---|"]
    for name, value in zip(names, values):
        share, low, high = accuracy(value["margins"])
        shown = f"{share:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {name} | {shown} | {len(value['margins'])} |")
    apart = compare(*values)
    lines += ["", "| | |", "|---|---|", *(f"| {what} | {x:.2g} |" for what, x in apart.items())]
    settings = ("steps", "pairs", "length", "learning_rate", "micro", "cores")
    record = {
        "settings": {name: getattr(args, name) for name in settings},
        "sides": {
            name: {k: list(map(float, v)) for k, v in piece.value.items()}
            | {"accuracy": accuracy(piece.value["margins"]), "seconds": piece.seconds}
            for name, piece in sides.items()
        },
        "compared": apart,
    }
    return record, "\n".join(lines)


def main() -> None:
    """Runs the sides one after the other and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("weights", help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("data", type=Path, help="hh-rlhf's pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--length", type=int, default=192, help="most tokens of a response")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--micro", type=int, default=4, help="TRL's micro-batch, in pairs")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--cores", type=int, default=2)
    sys.exit(0 if run(parser.parse_args()) else 1)


def run(args: argparse.Namespace) -> bool:
    """The benchmark; whether the curves agree."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    model = make_model(args.weights, ("reward",), args.workdir)
    data = args.workdir / "curves.jsonl"
    # One pair a prompt, so that each step has as many pairs as the next.
    pairs = {json.dumps(pair.prompt): pair for pair in read_pairs(args.data)}
    write_pairs(list(pairs.values()), data)
    config = make_config(model, data, args)
    cores = set(sorted(os.sched_getaffinity(0))[-args.cores :])
    told: dict[str, tuple[Any, dict[str, Any]]] = {
        "rmjax": (rmjax_side, {}),
        "TRL": (trl_side, {"micro": args.micro}),
    }
    console, sides = Console(highlight=False, soft_wrap=True), {}
    for name, (make, options) in told.items():
        side = Side(make, cores, config=config, **options)
        sides[name] = side(None)
        side.close()
        console.print(f"{name}: {sides[name].seconds:.0f} s; load average {load_average()}")
    record, table = report(sides, args)
    (args.workdir / "curves_vs_trl.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.workdir / "curves_vs_trl.md").write_text(table + "\n")
    console.print("\n" + table, markup=False)
    found = list(record["compared"].values())[:2]
    agree = all(apart <= allowed for apart, allowed in zip(found, TOLERANCES))
    console.print(
        f"\nthe losses {'agree' if agree else 'do not agree'} within {TOLERANCES[0]:g} over the "
        f"first {_FIRST} steps and {TOLERANCES[1]:g} over all"
    )
    return agree


if __name__ == "__main__":
    main()
