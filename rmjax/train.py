"""Trains a reward model or a policy.

    python -m rmjax.train --config=configs/NAME.py [--config.field=value]
    python -m rmjax.train --config=configs/quickstart.py --config.optimizer.learning_rate=1e-3

Running the same command again continues the run.
"""

from rmjax.training.command_line import answer_help, run_with_config

if __name__ == "__main__":
    answer_help()  # before the imports, which take a second

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rmjax.checkpoints.manager import Checkpoints
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import AlignConfig, Config, as_flat_dict
from rmjax.data.batches import Batches, iterate, training_batches
from rmjax.errors import UserError
from rmjax.evaluation.metrics import mean_ratings
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.processes import Preemption, check_agreement
from rmjax.runtime.sharding import Sharding, make_mesh
from rmjax.training.console import announce, conclude
from rmjax.training.datasets import check_position, data_position, load_planned
from rmjax.training.experiment import config_objective, first_params, make_model, pick_tokenizer
from rmjax.training.logger import MetricsLogger
from rmjax.training.reference import with_references
from rmjax.training.rows import record_of, row_limits
from rmjax.training.step import Metrics, TrainState, make_program
from rmjax.training.validate_config import validate
from rmjax.training.validation import evaluate
from rmjax.training.workdir import (
    open_workdir,
    package_versions,
    record_rows,
    record_run,
    recorded_rows,
)


def train(config: Config) -> None:
    """Runs the experiment from where it is to its end; every process of it calls this.

    Raises:
      UserError: something that the user can fix.
    """
    if isinstance(config, AlignConfig):
        raise UserError("an AlignConfig is a run of `python -m rmjax.align`")
    check_agreement("config", as_flat_dict(validate(config)) | package_versions())
    enable_compilation_cache()
    keep_freed_memory()
    with open_workdir(config) as workdir:
        train_in(workdir, config)


def train_in(workdir: Path, config: Config) -> None:
    """Runs the experiment in its directory; every process computes, the first one writes."""
    console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)

    # ---- mesh, model, tokenizer --------------------------------------------------------------
    sharding = Sharding(make_mesh(config.mesh))
    source = open_pretrained(config.init, config.chat_template) if config.init else None
    model = make_model(config, source, sharding)
    tokenizer = pick_tokenizer(config, source, model.config.vocab_size)

    # ---- data --------------------------------------------------------------------------------
    share, packing = config.data.share_prompts, config.data.packing
    recorded = recorded_rows(workdir)
    data, validation, plan, shapes = load_planned(config, model, tokenizer, recorded)
    objective, score = config_objective(config), make_score(model)
    if objective.reference:
        data, validation = with_references(
            config, source, model, score, data, validation, plan, shapes[0], console
        )
    batches = training_batches(data, plan, *shapes, packing=packing, share=share)
    held_out = None
    if validation:
        held_out = evaluation_batches(validation, shapes[0], packing=packing, share=share)
    constants = mean_ratings(data.labels)

    # ---- step --------------------------------------------------------------------------------
    program = make_program(
        model,
        objective,
        config.optimizer,
        steps=len(batches),
        trainable=config.trained,
        seed=config.seed,
    )

    # ---- state: 1. the run's last checkpoint, 2. the weights of `init`, 3. random weights ------
    checkpoints = Checkpoints(workdir)
    start, total = checkpoints.latest or 0, len(batches)
    check_agreement("data", data_position(start, batches, validation))
    if start:
        check_position(checkpoints.metadata(start)["position"], start, batches, validation)
    if start >= total:
        checkpoints.close()
        console.print(f"nothing to do: step {start} of {total} is done")
        conclude(console, workdir, checkpoints.evaluations, objective.policy)
        return
    if start:
        state = TrainState.from_items(checkpoints.restore(start, program.abstract.items()))
        origin = f"this run's, after step {start}"
    else:
        params, origin = first_params(config, source, model)
        state = program.start(params)
        del params  # donated with the state
    record_run(workdir, config, model, tokenizer, data, validation, source)
    if not config.data.row_length:
        record_rows(workdir, record_of(shapes, row_limits(config, model)))
    announce(
        console, workdir=workdir, model=model, origin=origin, batches=batches, held_out=held_out
    )

    # ---- loop --------------------------------------------------------------------------------
    flat_config = as_flat_dict(config)
    best = min((e["validation_loss"] for e in checkpoints.evaluations.values()), default=np.inf)
    stopped = False
    with (
        MetricsLogger(
            workdir, start=start, total=total, wandb=config.wandb, config=flat_config
        ) as report,
        Preemption() as preemption,
        contextlib.closing(checkpoints),  # waits for the last save, whatever ends the loop
    ):
        unseen: tuple[int, Metrics] | None = None  # the newest step, whose numbers nobody saw yet
        for step, batch in enumerate(iterate(batches, start, sharding), start=start + 1):
            state, metrics = program.step(state, batch)
            if unseen:  # one step late, so that the device never waits for the host
                finish_step(*unseen, batches, report)
            unseen = (step, metrics)

            stopped = preemption.requested(step)
            evaluating = held_out if is_due(step, config.eval_every, total) else None
            saving = stopped or is_due(step, config.checkpoint_every, total)
            if not (evaluating or saving):
                continue
            finish_step(*unseen, batches, report)
            unseen, evaluation = None, None
            if evaluating:
                began = time.monotonic()
                found = evaluate(score, state.params, evaluating, constants, objective, sharding)
                report.evaluation(step, found, time.monotonic() - began)
                evaluation = found.record()
                saving, best = saving or found.loss < best, min(best, found.loss)
            if saving:
                report.sync()
                checkpoints.save(
                    step,
                    state.items(),
                    position=data_position(step, batches, validation),
                    config=flat_config,
                    evaluation=evaluation,
                )
            if stopped:
                break

    if stopped and step < total:
        console.print(f"stopped by SIGTERM, step {step} of {total} is saved; run again to continue")
    else:
        conclude(console, workdir, checkpoints.evaluations, objective.policy)


def is_due(step: int, every: int, total: int) -> bool:
    """Whether something done every so many steps (0: never) and at the end is done now."""
    return step == total or (every > 0 and step % every == 0)


def finish_step(step: int, metrics: Metrics, batches: Batches, report: MetricsLogger) -> None:
    """Waits for a step, looks at its numbers and reports them.

    Raises:
      UserError: they are not finite; it names the step and its samples.
    """
    values: dict[str, Any] = {name: float(value) for name, value in metrics._asdict().items()}
    if not np.isfinite(list(values.values())).all():
        raise UserError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}. Stopped "
            f"before anything was saved. The step's samples: {batches.describe(step - 1)}"
        )
    report.step(step, values, batches.tokens(step - 1), batches.padded_tokens(step - 1))


if __name__ == "__main__":
    run_with_config(train)
