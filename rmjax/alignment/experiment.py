"""From a config to the parts of a run: what samples, what rewards, what learns; and its state."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from rmjax.alignment.critic import Critic
from rmjax.alignment.memory import memory_lines, plan_memory, reward_model
from rmjax.alignment.prompts import Prompts, plan_prompts, read_prompts
from rmjax.alignment.reference import Reference
from rmjax.alignment.rewards import Rewards, open_rewards
from rmjax.alignment.server_sampling import ServerSampling
from rmjax.alignment.steps import Sampler, Sampling, step_shape
from rmjax.alignment.updates import Learner, updates_of
from rmjax.checkpoints.end_tokens import end_tokens
from rmjax.checkpoints.manager import Checkpoints
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained
from rmjax.config import AlignConfig
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenizer import Tokenizer
from rmjax.errors import UserError
from rmjax.models.model import Model
from rmjax.runtime.processes import check_agreement
from rmjax.runtime.sharding import Sharding, make_mesh
from rmjax.training.experiment import config_objective, first_params, make_model, pick_tokenizer
from rmjax.training.objectives.rollouts import has_critic
from rmjax.training.rows import record_of, row_limits
from rmjax.training.step import Program, TrainState, make_program
from rmjax.training.workdir import record_rows, record_run, recorded_rows


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; only the reward models are loaded.

    Attributes:
      source: the weights to begin with, if not random ones.
      model: that is trained.
      tokenizer: its.
      prompts: that it learns from.
      held_out: prompts that show what was learned, if there are any.
      plan: the prompts of each step, by number.
      program: the policy's step.
      critic: of a method that has one.
      shape: of the rows that are learned from.
      learner: makes the updates of a step.
      sampling: makes samples.
      rewards: say what they are worth.
    """

    source: Pretrained | None
    model: Model
    tokenizer: Tokenizer
    prompts: Prompts
    held_out: Prompts | None
    plan: list[Int64[np.ndarray, "P"]]
    program: Program
    critic: Critic | None
    shape: RowShape
    learner: Learner
    sampling: Sampler
    rewards: Rewards

    @functools.cached_property
    def data_key(self) -> str:
        """Fingerprint of the prompts."""
        return self.prompts.data().key

    def position(self, step: int) -> dict[str, Any]:
        """Where the data are after a step: part of a checkpoint."""
        return {"next_step": step, "data": self.data_key}

    def items(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds, by name."""
        return state.items() | (self.critic.items() if self.critic else {})

    def abstract(self) -> dict[str, Any]:
        """The shapes of that."""
        return self.program.abstract.items() | (self.critic.abstract() if self.critic else {})


def open_parts(config: AlignConfig, workdir: Path, say: Callable[[str, object], None]) -> Parts:
    """Opens everything that a config names.

    Args:
      config: of the run.
      workdir: its directory.
      say: what there is to say of something.

    Raises:
      UserError: something is not there, or does not fit the rest.
    """
    sharding = Sharding(make_mesh(config.mesh))
    source = open_pretrained(config.init, config.chat_template) if config.init else None
    model = make_model(config, source, sharding)
    tokenizer = pick_tokenizer(config, source, model.config.vocab_size)

    prompts = read_prompts(config, tokenizer, config.data.train, "train")
    held_out = None
    if config.data.validation:
        held_out = read_prompts(config, tokenizer, config.data.validation, "validation")
    each = config.batch_size // config.rollout.n
    plan = plan_prompts(
        len(prompts), each=each, seed=config.seed, steps=config.steps, epochs=config.epochs
    )

    updates = len(plan) * updates_of(config)
    program = make_program(
        model,
        config_objective(config),
        config.optimizer,
        steps=updates,
        trainable=config.trained,
        seed=config.seed,
    )
    shape = step_shape(config, model, prompts, recorded_rows(workdir))
    critic = Critic(config, model, tokenizer, updates) if has_critic(config) else None
    ends = end_tokens(source.files if source else None, tokenizer)
    if config.rollout.server:
        sampling = ServerSampling(config, model, tokenizer, ends, workdir)
    else:
        asked = [*prompts.tokens, *(held_out.tokens if held_out else ())]
        sampling = Sampling(config, model, tokenizer, ends, asked)
    judges = [reward_model(r.model, model) for r in config.rewards.values() if r.model]
    states = [program.abstract, *([critic.program.abstract] if critic else [])]
    for line in memory_lines(plan_memory(config, model, states, judges)):
        say("memory", line)
    return Parts(
        source=source,
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out,
        plan=plan,
        program=program,
        critic=critic,
        shape=shape,
        learner=Learner(config, model, program, critic, shape),
        sampling=sampling,
        rewards=open_rewards(config.rewards, config.mesh, tokenizer),
    )


def check_position(parts: Parts, checkpoints: Checkpoints, start: int, workdir: Path) -> None:
    """Raises a `UserError` unless all processes, and the checkpoint, are of the same prompts."""
    seen = {"step": start, "prompts": parts.data_key}
    check_agreement("data", seen | {"held out": parts.held_out and parts.held_out.data().key})
    if start and checkpoints.metadata(start)["position"] != parts.position(start):
        raise UserError(f"{workdir}: step {start} was made with other prompts; use those again")


def first_state(
    config: AlignConfig, parts: Parts, checkpoints: Checkpoints, start: int
) -> tuple[TrainState, Reference, str]:
    """The state after `start` steps, the reference, and where the weights are from.

    They are 1. the run's last checkpoint's, 2. those of `init`, 3. random ones. The critic has its
    state as well.
    """
    lora = bool(config.lora.rank)
    first, origin = None, ""
    if not (start and lora):
        first, origin = first_params(config, parts.source, parts.model)
    reference = Reference(parts.model, None if lora else first)
    if start:
        del first  # the state needs its room
        items = checkpoints.restore(start, parts.abstract())
        if parts.critic:
            parts.critic.resume(items)
        return TrainState.from_items(items), reference, f"this run's, after step {start}"
    assert first is not None
    state = parts.program.start(first)  # which donates them
    if parts.critic:
        parts.critic.start()
    return state, reference, origin


def record(workdir: Path, config: AlignConfig, parts: Parts) -> None:
    """Puts a run on record; only then may it leave other files."""
    held_out = parts.held_out.data() if parts.held_out else None
    data, source = parts.prompts.data(), parts.source
    record_run(workdir, config, parts.model, parts.tokenizer, data, held_out, source)
    if not config.data.row_length:
        record_rows(workdir, record_of([parts.shape], row_limits(config, parts.model)))


def announce(
    workdir: Path,
    config: AlignConfig,
    parts: Parts,
    origin: str,
    say: Callable[[str, object], None],
) -> None:
    """Says what a run is."""
    prompts, learner = parts.prompts, parts.learner
    each = config.batch_size // config.rollout.n
    counts = ", ".join(f"{count:,} {reason}" for reason, count in prompts.counts.items())
    say("run", workdir)
    say("weights", origin)
    say("prompts", f"{prompts.source}: {counts}")
    updates = "1 update" if learner.updates == 1 else f"{learner.updates} updates"
    say("step", f"{each} prompts, {config.rollout.n} samples of each, {updates}")
    shape = parts.shape
    say("rows", f"{shape.length} tokens, up to {shape.slots} samples, {shape.rows} rows at once")
    say("method", f"{config.objective}, kl {learner.method.kl:g}")
    if parts.critic:
        say("critic", parts.critic.name)
    for name, said in parts.rewards.said().items():
        say(f"reward {name}", said)
