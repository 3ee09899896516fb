"""Both sides of a comparison: rmjax's step, and TRL's trainers told to do what it does."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from timing import CLOCKS, Piece

from rmjax.config import Config, OptimizerConfig


def rmjax_side(clock: str, config: Config) -> Callable[[int], Piece]:
    """rmjax's own step, compiled; the parts are put together as `rmjax.train` does it."""
    import jax
    from rich.console import Console

    from rmjax.checkpoints.pretrained import open_pretrained
    from rmjax.data.batch import batch_axes
    from rmjax.data.batches import training_batches
    from rmjax.inference.score_step import make_score
    from rmjax.runtime.memory import keep_freed_memory
    from rmjax.runtime.sharding import put
    from rmjax.training.experiment import config_objective, first_params
    from rmjax.training.reference import with_references
    from rmjax.training.step import make_program

    keep_freed_memory()
    batches, plan, shapes, model = make_batches(config)
    sharding, source = model.options.sharding, open_pretrained(config.init)
    objective = config_objective(config)
    if objective.reference:
        score, console = make_score(model), Console(quiet=True)
        data, _ = with_references(
            config, source, model, score, batches.data, None, plan, shapes[0], console
        )
        batches = training_batches(data, plan, *shapes)
    program = make_program(
        model, objective, config.optimizer, steps=len(batches), trainable=config.trainable
    )
    params, _ = first_params(config, source, model)
    state = program.start(params)
    axes = batch_axes(batches[0])
    step: Any = program.step
    compiled: dict[Any, Any] = {}
    for number in range(len(batches)):  # every shape of the run, before anything is timed
        batch = batches[number]
        if batch.rows.tokens.shape not in compiled:
            lowered = step.lower(state, put(batch, axes, sharding))
            compiled[batch.rows.tokens.shape] = lowered.compile()

    def work(number: int) -> Piece:
        nonlocal state
        started = CLOCKS[clock]()
        batch = batches[number]
        state, metrics = compiled[batch.rows.tokens.shape](state, put(batch, axes, sharding))
        jax.block_until_ready(state)
        return Piece(CLOCKS[clock]() - started, float(metrics.loss))

    return work


def make_batches(config: Config) -> tuple[Any, list[Any], tuple[Any, ...], Any]:
    """The run's batches, samples of each step, shapes and model, the same wherever it is called."""
    from rmjax.checkpoints.pretrained import open_pretrained
    from rmjax.data.batches import training_batches
    from rmjax.runtime.sharding import Sharding, make_mesh
    from rmjax.training.datasets import load_planned
    from rmjax.training.experiment import make_model, pick_tokenizer

    source = open_pretrained(config.init)
    model = make_model(config, source, Sharding(make_mesh(config.mesh)))
    tokenizer = pick_tokenizer(config, source, source.decoder.vocab_size)
    data, _, plan, shapes = load_planned(config, model, tokenizer)
    return training_batches(data, plan, *shapes), plan, shapes, model


def torch_steps(task: str, data: Any, plan: Any) -> list[list[dict[str, Any]]]:
    """The same steps for the other side, each sorted by length."""
    steps = []
    for samples in plan:
        tokens = [data.sequence(i).tolist() for i in samples]
        if task == "pairs":
            step = [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(tokens[::2], tokens[1::2])]
        else:
            labels = data.labels[samples].tolist()
            step = [{"input_ids": ids, "labels": y} for ids, y in zip(tokens, labels)]
        steps.append(sorted(step, key=longest, reverse=True))
    return steps


def policy_steps(task: str, data: Any, plan: Any) -> list[list[dict[str, Any]]]:
    """Likewise of a policy's responses, or of pairs of them, up to their end tokens."""
    import numpy as np

    steps = []
    for samples in plan:
        cut = []
        for sample in samples:
            spoken = np.flatnonzero(data.spoken_in(sample))
            tokens = data.sequence(sample)[: spoken[-1] + 1].tolist()
            cut.append((tokens[: spoken[0]], tokens[spoken[0] :]))
        if task == "dpo":
            step = []
            for (prompt, chosen), (again, rejected) in zip(cut[::2], cut[1::2]):
                assert prompt == again
                step.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            step = [
                {"input_ids": prompt + said, "labels": [-100] * len(prompt) + said}
                for prompt, said in cut
            ]
        steps.append(sorted(step, key=longest, reverse=True))
    return steps


def longest(sample: dict[str, Any]) -> int:
    """Tokens of a sample's longest sequence."""
    return max(len(ids) for name, ids in sample.items() if name.endswith("_ids"))


def trainer_arguments(
    optimizer: OptimizerConfig, steps: int, micro: int, microbatches: int
) -> dict[str, Any]:
    """What transformers' trainers are told so that they do what rmjax does without warm-up.

    With warm-up their rate would be a step behind: theirs starts at 0.
    """
    return dict(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=microbatches,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=0,
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


def torch_side(
    clock: str,
    task: str,
    model: str,
    steps: list[list[dict[str, Any]]],
    micro: int,
    optimizer: OptimizerConfig,
) -> Callable[[int], Piece]:
    """The library's own trainer; a step is one call of `train` less what comes before and after."""
    import datasets
    import torch
    import transformers
    from trl.trainer.reward_config import RewardConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.reward_trainer import RewardTrainer  # pyright: ignore[reportMissingImports]

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
    arguments = trainer_arguments(optimizer, 1, micro, len(steps[0]) // micro)
    first = datasets.Dataset.from_list(steps[0])
    if task == "pairs":
        config = RewardConfig(**arguments, max_length=None)
        trainer = RewardTrainer(network, config, None, first, processing_class=tokenizer)
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


def trl_policy_side(
    clock: str,
    task: str,
    model: str,
    steps: list[list[dict[str, Any]]],
    micro: int,
    beta: float,
    optimizer: OptimizerConfig,
) -> Callable[[int], Piece]:
    """TRL's DPOTrainer or SFTTrainer; all steps are one call of `train`, at the first request.

    The reference's log-probabilities are computed before the first step, as rmjax does it.
    """
    import datasets
    import torch
    import transformers
    from trl.trainer.dpo_config import DPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(CLOCKS[clock]())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(CLOCKS[clock]())

    class Tokenized(DPOTrainer):
        """Of pairs that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # it may have counted them before
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    arguments = trainer_arguments(optimizer, len(steps), micro, len(steps[0]) // micro)
    rows = datasets.Dataset.from_list([row for step in steps for row in step])
    told: dict[str, Any] = dict(train_dataset=rows, processing_class=tokenizer)
    if task == "dpo":
        config = DPOConfig(**arguments, max_length=None, beta=beta, precompute_ref_log_probs=True)
        trainer = Tokenized(network, args=config, **told)
    else:
        trainer = SFTTrainer(network, args=SFTConfig(**arguments, max_length=None), **told)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Clock())
    with torch.no_grad():  # threads and kernels are warm
        network(torch.ones((1, 128), dtype=torch.long))

    def work(number: int) -> Piece:
        if not times:
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return Piece(times[2 * number + 1] - times[2 * number], losses[number])

    return work
