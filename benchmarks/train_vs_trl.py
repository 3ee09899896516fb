"""Training on the CPU: rmjax against TRL's RewardTrainer, or transformers' five-label regression.

    python benchmarks/train_vs_trl.py pairs GGUF hh_harmless_base_test.jsonl.gz
    python benchmarks/train_vs_trl.py dialogues GGUF topical_chat_ratings.jsonl

Measures samples a second of whole steps (forward, backward, AdamW): pairs with a Bradley-Terry
loss, or rated replies to dialogues. Both sides see the same tokens in the same steps, with the same
weights, in float32 on the same cores, nothing recomputed in the backward pass; they take turns,
step by step. On a busy machine `--cores=1 --clock=cpu` counts the seconds a process computed, not
those it waited. The other side gets each step sorted by length (what length grouping does, at its
best) in micro-batches of the best of several sizes, which is looked for first. The losses are
printed: both sides do the same thing. Needs `rmjax[bench]`. Ten minutes on two quiet cores.
"""

import argparse
import os
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from material import RATINGS, make_model, read_pairs, write_pairs
from rich.console import Console
from rich.table import Table
from timing import CLOCKS, Piece, Side, in_turn, load_average, rate, speedup

from rmjax.config import Config, DataConfig, EveryConfig

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m_regression.py"
TASKS = {
    "pairs": {"attributes": ("reward",), "length": 512, "row": 1024, "batch": 64},
    "dialogues": {"attributes": RATINGS, "length": 1056, "row": 2048, "batch": 24},
}


def make_config(task: str, model: Path, data: Path, steps: int, batch: int) -> Config:
    """SmolLM2's config with the task's data; `batch_size` is in responses."""
    told = TASKS[task]
    config: Config = runpy.run_path(str(CONFIG))["get_config"]()
    config.init, config.model, config.steps, config.epochs = str(model), None, steps, 0.0
    config.data = DataConfig(
        train=str(data),
        attributes=told["attributes"],
        label_range=(0.0, 5.0),
        max_length=told["length"],
        row_length=told["row"],
    )
    config.batch_size = batch or told["batch"]
    config.eval, config.checkpoint = EveryConfig(), EveryConfig()
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-5, "constant"
    config.optimizer.warmup_steps = 0
    return config


def rmjax_side(clock: str, config: Config) -> Callable[[int], Piece]:
    """rmjax's own step, compiled; the parts are put together as `rmjax.train` does it."""
    import jax

    from rmjax.data.batches import put
    from rmjax.experiment import first_params, make_model
    from rmjax.objectives import OBJECTIVES
    from rmjax.optimizer import make_optimizer, make_schedule
    from rmjax.pretrained import open_pretrained
    from rmjax.rows import BATCH_AXES
    from rmjax.sharding import Sharding, make_mesh
    from rmjax.step import abstract_state, init_state, make_train_step

    batches = make_batches(config)
    sharding, source = Sharding(make_mesh(config.mesh)), open_pretrained(config.init)
    model = make_model(config, source, sharding)
    schedule = make_schedule(config.optimizer, len(batches))
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract = abstract_state(model, optimizer, config.trainable)
    state = init_state(
        first_params(config, source, model)[0], optimizer, config.trainable, abstract
    )
    objective = OBJECTIVES[config.objective]
    step = make_train_step(model, objective, optimizer, schedule, config.trainable, abstract)
    compiled = step.lower(state, put(batches[0], BATCH_AXES, sharding)).compile()

    def work(number: int) -> Piece:
        nonlocal state
        started = CLOCKS[clock]()
        state, metrics = compiled(state, put(batches[number], BATCH_AXES, sharding))
        jax.block_until_ready(state)
        return Piece(CLOCKS[clock]() - started, float(metrics.loss))

    return work


def make_batches(config: Config) -> Any:
    """The run's batches, the same wherever they are made."""
    from rmjax.data.batches import Batches, plan_steps, row_shape
    from rmjax.experiment import load_data, pick_tokenizer
    from rmjax.pretrained import open_pretrained

    source = open_pretrained(config.init)
    data, _ = load_data(config, pick_tokenizer(config, source, source.llama.vocab_size))
    plan = plan_steps(data, batch_size=config.batch_size, seed=config.seed, steps=config.steps)
    shape = row_shape(data, rows=1, length=config.row_length, packing=config.data.packing)
    return Batches(data, plan, shape)


def torch_steps(task: str, batches: Any) -> list[list[dict[str, Any]]]:
    """The same steps for the other side, each sorted by length."""
    data, steps = batches.data, []
    for samples in batches.plan:
        tokens = [data.sequence(i).tolist() for i in samples]
        if task == "pairs":
            step = [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(tokens[::2], tokens[1::2])]
        else:
            labels = data.labels[samples].tolist()
            step = [{"input_ids": ids, "labels": y} for ids, y in zip(tokens, labels)]
        steps.append(sorted(step, key=longest, reverse=True))
    return steps


def longest(sample: dict[str, Any]) -> int:
    """Tokens of a sample's longest sequence."""
    return max(len(ids) for name, ids in sample.items() if name.endswith("_ids"))


def torch_side(
    clock: str, task: str, model: str, steps: list[list[dict[str, Any]]], micro: int, optimizer: Any
) -> Callable[[int], Piece]:
    """The library's own trainer; a step is one call of `train` less what comes before and after."""
    import datasets
    import torch
    import transformers
    import trl

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(CLOCKS[clock]())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(CLOCKS[clock]())

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # it may have counted them before
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32
    )
    network.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    arguments = dict(
        output_dir=tempfile.gettempdir(),
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(steps[0]) // micro,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.b1,
        adam_beta2=optimizer.b2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_norm,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    first = datasets.Dataset.from_list(steps[0])
    if task == "pairs":
        config = trl.RewardConfig(**arguments, max_length=None)
        trainer = trl.RewardTrainer(network, config, None, first, processing_class=tokenizer)
    else:
        config = transformers.TrainingArguments(**arguments)
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(network, config, collator, first)
        trainer.model_accepts_loss_kwargs = False  # its regression loss is a mean already
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Clock())
    with torch.no_grad():  # threads and kernels are warm
        network(torch.ones((1, 128), dtype=torch.long))

    def work(number: int) -> Piece:
        times.clear()
        trainer.train_dataset = datasets.Dataset.from_list(steps[number])
        trainer.train()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
        return Piece(times[-1] - times[0], loss)

    return work


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
    model = make_model(args.weights, TASKS[args.task]["attributes"], args.workdir)
    data = args.data
    if args.task == "pairs":
        data = args.workdir / "pairs.jsonl"
        write_pairs(read_pairs(args.data), data)
    config = make_config(args.task, model, data, args.steps + 1, args.batch)
    batches = make_batches(config)
    steps = torch_steps(args.task, batches)
    cores, sizes = set(range(args.cores)), [int(size) for size in args.sizes.split(",")]
    told = dict(
        clock=args.clock, task=args.task, model=str(model), steps=steps, optimizer=config.optimizer
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
