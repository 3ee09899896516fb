"""A policy learns from samples of its own, which a reward model rewards.

    python -m rmjax.align --config=configs/NAME.py [--config.field=value]

Step by step: sample, reward, learn. Running the same command again continues the run.
"""

from rmjax.training.command_line import answer_help, run_with_config

if __name__ == "__main__":
    answer_help()  # before the imports, which take a second

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from rmjax.alignment.experiment import (
    Parts,
    announce,
    check_position,
    first_state,
    open_parts,
    record,
)
from rmjax.alignment.rollouts import (
    Rollout,
    held_out_file,
    read_rollout,
    rollout_file,
    write_rollout,
)
from rmjax.alignment.steps import (
    held_out_rollout,
    make_rollout,
    reward_of,
    single_rewards,
    with_rewards,
)
from rmjax.checkpoints.manager import Checkpoints
from rmjax.config import AlignConfig, Config, as_flat_dict
from rmjax.errors import UserError
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.processes import Preemption, check_agreement
from rmjax.train import is_due
from rmjax.training.console import conclude
from rmjax.training.logger import MetricsLogger
from rmjax.training.validate_config import validate
from rmjax.training.workdir import open_workdir, package_versions


def align(config: Config) -> None:
    """Runs the experiment from where it is to its end; every process of it calls this.

    Raises:
      UserError: something that the user can fix.
    """
    if not isinstance(config, AlignConfig):
        raise UserError("this config is for `python -m rmjax.train`; give an AlignConfig")
    check_agreement("config", as_flat_dict(validate(config)) | package_versions())
    enable_compilation_cache()
    keep_freed_memory()
    with open_workdir(config) as workdir:
        align_in(workdir, config)


def align_in(workdir: Path, config: AlignConfig) -> None:
    """Runs the experiment in its directory; every process computes, the first one writes."""
    console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)

    def say(name: str, what: object) -> None:
        console.print(f"{name:<11} {what}", markup=False)

    # ---- what samples, what rewards, what learns; and its state ---------------------------------
    parts = open_parts(config, workdir, say)
    checkpoints, total = Checkpoints(workdir), len(parts.plan)
    start = checkpoints.latest or 0
    check_position(parts, checkpoints, start, workdir)
    if start >= total:
        checkpoints.close()
        console.print(f"nothing to do: step {start} of {total} is done")
        return
    state, reference, origin = first_state(config, parts, checkpoints, start)
    record(workdir, config, parts)
    parts.rewards.standardize(workdir)
    announce(workdir, config, parts, origin, say)

    # ---- loop --------------------------------------------------------------------------------
    flat_config = as_flat_dict(config)
    best = min((e["validation_loss"] for e in checkpoints.evaluations.values()), default=np.inf)
    stopped, step = False, start
    with (
        MetricsLogger(
            workdir, start=start, total=total, wandb=config.wandb, config=flat_config
        ) as report,
        Preemption() as preemption,
        contextlib.closing(checkpoints),
    ):
        if parts.held_out and not start:
            report.numbers(0, held_out_numbers(workdir, config, parts, state.params, 0))
        for step in range(start + 1, total + 1):
            clock = [time.monotonic()]
            rollout = rollout_of_step(workdir, config, parts, state.params, step)
            clock.append(time.monotonic())
            data = rollout.data(parts.prompts)
            known = parts.learner.known(state.params, reference, rollout, data)
            clock.append(time.monotonic())
            state, values, tokens, padded = parts.learner(state, rollout, data, known)
            clock.append(time.monotonic())
            check_finite(step, values, rollout_file(workdir, step))
            values |= single_rewards(rollout) | seconds_of(clock)
            if config.rollout.server and rollout.weights is not None:
                values["stale_steps"] = float(step - 1 - rollout.weights)
            report.step(step, values, tokens, padded)

            stopped = preemption.requested(step)
            saving = stopped or is_due(step, config.checkpoint_every, total)
            evaluation = None
            if parts.held_out and is_due(step, config.eval_every, total):
                found = held_out_numbers(workdir, config, parts, state.params, step)
                report.numbers(step, found)
                loss = -found["held_out/reward"]
                evaluation = {"validation_loss": loss, "attributes": {}} | found
                saving, best = saving or loss < best, min(best, loss)
            if saving:
                report.sync()
                checkpoints.save(
                    step,
                    parts.items(state),
                    position=parts.position(step),
                    config=flat_config,
                    evaluation=evaluation,
                )
            if stopped:
                break

    if stopped and step < total:
        console.print(f"stopped by SIGTERM, step {step} of {total} is saved; run again to continue")
    else:
        conclude(console, workdir, checkpoints.evaluations, policy=True)


def rollout_of_step(
    workdir: Path, config: AlignConfig, parts: Parts, params: Params, step: int
) -> Rollout:
    """The samples of a step with their rewards: those that a killed step left, or new ones.

    They are written before they are rewarded, and again before anything is learned from them.
    """
    file, numbers = rollout_file(workdir, step), parts.plan[step - 1]
    made_by = {"step": step, "seed": config.seed}
    rollout = read_rollout(file, made_by, numbers.tolist())
    if rollout is None:
        rollout = make_rollout(
            parts.sampling, params, parts.prompts, numbers, config.rollout.n, step
        )
        write_rollout(file, rollout, parts.prompts, made_by)
    if not rollout.rewarded:
        with kept_samples(file):
            rollout = with_rewards(rollout, parts.prompts, parts.rewards)
        write_rollout(file, rollout, parts.prompts, made_by)
    return rollout


def held_out_numbers(
    workdir: Path, config: AlignConfig, parts: Parts, params: Params, step: int
) -> dict[str, float]:
    """What the answers to held-out prompts come to after a step; they are written, too."""
    assert parts.held_out is not None
    answers = held_out_rollout(parts.sampling, params, parts.held_out, step)
    answers = with_rewards(answers, parts.held_out, parts.rewards)
    made_by = {"step": step, "seed": config.seed}
    write_rollout(held_out_file(workdir, step), answers, parts.held_out, made_by)
    return reward_of(answers)


def seconds_of(clock: Sequence[float]) -> dict[str, float]:
    """How long the parts of a step took; `clock` is before, between and after them."""
    names = ("seconds_sampling", "seconds_scoring", "seconds_updating")
    return {name: after - before for name, before, after in zip(names, clock, clock[1:])}


@contextlib.contextmanager
def kept_samples(file: Path) -> Iterator[None]:
    """Says, if the samples of a step cannot be rewarded, that they are not lost."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{error}. The step's samples are kept in {file}; run the command again to reward "
            "them, or remove the file to have others"
        ) from error


def check_finite(step: int, values: dict[str, float], file: Path) -> None:
    """Raises a `UserError` if a loss or a gradient of a step, also the critic's, is not finite."""
    found = {n: value for n, value in values.items() if n.endswith(("loss", "grad_norm"))}
    if not np.isfinite(list(found.values())).all():
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(
            f"step {step}: {said}. Stopped before anything was saved. The step's samples: {file}"
        )


if __name__ == "__main__":
    run_with_config(align)
