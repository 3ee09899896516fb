"""The other sides: TRL's RewardTrainer and transformers' Trainer, told to do what rmjax does."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from timing import CLOCKS, Piece

from rmjax.config import OptimizerConfig


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
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

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
