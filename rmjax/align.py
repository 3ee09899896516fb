"""A policy learns from samples of its own, which a reward model rewards.

    python -m rmjax.align --config=configs/NAME.py [--config.field=value]

Step by step: sample, reward, learn. Running the same command again continues the run.
"""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from rmjax.alignment.critic import Critic
from rmjax.alignment.memory import memory_lines, plan_memory, reward_model
from rmjax.alignment.prompts import plan_prompts, read_prompts
from rmjax.alignment.reference import Reference
from rmjax.alignment.rewards import open_reward
from rmjax.alignment.rollouts import held_out_file, read_rollout, rollout_file, write_rollout
from rmjax.alignment.steps import Sampling, held_out_rollout, make_rollout, reward_of
from rmjax.alignment.updates import Learner, updates_of
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.manager import Checkpoints
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import AlignConfig, Config, as_flat_dict
from rmjax.errors import UserError
from rmjax.runtime.compilation import enable_compilation_cache
from rmjax.runtime.memory import keep_freed_memory
from rmjax.runtime.processes import Preemption, check_agreement
from rmjax.runtime.sharding import Sharding, make_mesh
from rmjax.train import is_due
from rmjax.training.command_line import run_with_config
from rmjax.training.console import conclude
from rmjax.training.experiment import config_objective, first_params, make_model, pick_tokenizer
from rmjax.training.logger import MetricsLogger
from rmjax.training.objectives.rollouts import has_critic
from rmjax.training.step import TrainState, make_program
from rmjax.training.validate_config import validate
from rmjax.training.workdir import open_workdir, package_versions, record_run


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

    # ---- policy, tokenizer, reward -----------------------------------------------------------
    sharding = Sharding(make_mesh(config.mesh))
    source = open_pretrained(config.init, config.chat_template) if config.init else None
    model = make_model(config, source, sharding)
    tokenizer = pick_tokenizer(config, source, model.config.vocab_size)

    # ---- prompts -----------------------------------------------------------------------------
    each = config.batch_size // config.rollout.n
    prompts = read_prompts(config, tokenizer, config.data.train, "train")
    held_out = None
    if config.data.validation:
        held_out = read_prompts(config, tokenizer, config.data.validation, "validation")
    plan = plan_prompts(
        len(prompts), each=each, seed=config.seed, steps=config.steps, epochs=config.epochs
    )

    # ---- step --------------------------------------------------------------------------------
    total = len(plan)
    updates = total * updates_of(config)
    program = make_program(
        model,
        config_objective(config),
        config.optimizer,
        steps=updates,
        trainable=config.trained,
        seed=config.seed,
    )
    critic = Critic(config, model, tokenizer, updates) if has_critic(config) else None
    learner = Learner(config, model, program, critic)
    ends = end_tokens(source.files if source else None, tokenizer)
    sampling = Sampling(config, model, tokenizer, ends)
    rewards = [reward_model(config.reward.model, model)] if config.reward.model else []
    states = [program.abstract, *([critic.program.abstract] if critic else [])]
    for line in memory_lines(plan_memory(config, model, states, rewards)):
        console.print(f"{'memory':<11} {line}", markup=False)
    reward = open_reward(config.reward, config.mesh)

    # ---- state: 1. the run's last checkpoint, 2. the weights of `init`, 3. random weights ------
    checkpoints = Checkpoints(workdir)
    start = checkpoints.latest or 0
    data_key = prompts.data().key
    seen = {"step": start, "prompts": data_key}
    check_agreement("data", seen | ({"held out": held_out.data().key} if held_out else {}))
    if start and checkpoints.metadata(start)["position"] != {"next_step": start, "data": data_key}:
        raise UserError(f"{workdir}: step {start} was made with other prompts; use those again")
    if start >= total:
        checkpoints.close()
        console.print(f"nothing to do: step {start} of {total} is done")
        return
    first, origin = None, ""
    if not (start and config.lora.rank):
        first, origin = first_params(config, source, model)
    reference = Reference(model, None if config.lora.rank else first)
    if start:
        first = None  # the state needs its room
        wanted = program.abstract.items() | (critic.abstract() if critic else {})
        items = checkpoints.restore(start, wanted)
        state = TrainState.from_items(items)
        if critic:
            critic.resume(items)
        origin = f"this run's, after step {start}"
    else:
        assert first is not None
        state = program.start(first)
        if critic:
            critic.start()
    del first  # donated with the state
    described = held_out.data() if held_out else None
    record_run(workdir, config, model, tokenizer, prompts.data(), described, source)
    for name, said in (
        ("run", workdir),
        ("weights", origin),
        ("prompts", f"{prompts.source}: {said_of(prompts.counts)}"),
        ("step", f"{each} prompts, {config.rollout.n} samples of each, {learner.updates} updates"),
        ("method", f"{config.objective}, kl {learner.method.kl:g}"),
        *([("critic", critic.name)] if critic else []),
    ):
        console.print(f"{name:<11} {said}", markup=False)

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
        if held_out and not start:
            found = held_out_rollout(sampling, state.params, held_out, reward)
            made_by = {"step": 0, "seed": config.seed}
            write_rollout(held_out_file(workdir, 0), found, held_out, made_by)
            report.numbers(0, reward_of(found))
        for step in range(start + 1, total + 1):
            # 1. Samples with their rewards: those that a killed step left, or new ones.
            began = time.monotonic()
            file, numbers = rollout_file(workdir, step), plan[step - 1]
            made_by = {"step": step, "seed": config.seed}
            rollout = read_rollout(file, made_by, numbers.tolist())
            if rollout is None:
                rollout = make_rollout(
                    sampling, state.params, prompts, numbers, reward, config.rollout.n, step
                )
                write_rollout(file, rollout, prompts, made_by)
            sampled = time.monotonic()

            # 2. What the policy and the reference say of them.
            data = rollout.data(prompts)
            known = learner.known(state.params, reference, rollout, data)
            scored = time.monotonic()

            # 3. Updates.
            state, values, tokens, padded = learner(state, rollout, data, known)
            check_finite(step, values, file)
            values["seconds_sampling"] = sampled - began
            values["seconds_scoring"] = scored - sampled
            values["seconds_updating"] = time.monotonic() - scored
            report.step(step, values, tokens, padded)

            stopped = preemption.requested(step)
            evaluating = held_out if is_due(step, config.eval_every, total) else None
            saving = stopped or is_due(step, config.checkpoint_every, total)
            evaluation = None
            if evaluating:
                answers = held_out_rollout(sampling, state.params, evaluating, reward)
                write_rollout(held_out_file(workdir, step), answers, evaluating, made_by)
                found = reward_of(answers)
                report.numbers(step, found)
                loss = -found["held_out/reward"]
                evaluation = {"validation_loss": loss, "attributes": {}} | found
                saving, best = saving or loss < best, min(best, loss)
            if saving:
                checkpoints.save(
                    step,
                    state.items() | (critic.items() if critic else {}),
                    position={"next_step": step, "data": data_key},
                    config=flat_config,
                    evaluation=evaluation,
                )
            if stopped:
                break

    if stopped and step < total:
        console.print(f"stopped by SIGTERM, step {step} of {total} is saved; run again to continue")
    else:
        conclude(console, workdir, checkpoints.evaluations, policy=True)


def said_of(counts: dict[str, int]) -> str:
    """Counts by reason, as words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def check_finite(step: int, values: dict[str, float], file: Path) -> None:
    """Raises a `UserError` if a step's loss or gradient is not finite."""
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
        raise UserError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}. Stopped "
            f"before anything was saved. The step's samples: {file}"
        )


if __name__ == "__main__":
    run_with_config(align)
