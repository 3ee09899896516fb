"""The programs of a step of `rmjax.align`, compiled for chips that need not exist.

What lives when follows from shapes, as a run plans it (`alignment/memory.py`); what each program
needs beside that, and how long it takes, from compiling it.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rmjax.alignment.critic import critic_model, critic_program
from rmjax.alignment.memory import ALWAYS, SAMPLING, Part, plan_memory, reward_model
from rmjax.alignment.reference import reference_shapes
from rmjax.alignment.steps import StepRows, planned_shape, sampled_model
from rmjax.alignment.updates import updates_of
from rmjax.alignment.weights import changes, move_program
from rmjax.aot.attention_cost import Steps, kernel_steps
from rmjax.aot.compiled import Compiled, compile_program
from rmjax.aot.hardware import Chip
from rmjax.aot.program import (
    Report,
    Workload,
    abstract_batch,
    abstract_program,
    architecture,
    check_program,
    dtype,
)
from rmjax.aot.sampling import SamplingLoad, SamplingReport, check_sampling, placed
from rmjax.config import AlignConfig
from rmjax.data.tokenized import TokenizedData, TokenReturns, in_memory
from rmjax.errors import UserError
from rmjax.inference.batching import ScoringShapes
from rmjax.inference.score_step import make_score, make_token_scores
from rmjax.models.attention.dispatch import choose
from rmjax.models.decoder_config import NO_LORA
from rmjax.models.heads import RewardHead
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.layers import ModelOptions
from rmjax.models.log_probabilities import CHUNK_LOOP
from rmjax.models.model import Model
from rmjax.models.parameters import Params, flatten
from rmjax.runtime.sharding import Sharding, local_bytes
from rmjax.training.experiment import new_model
from rmjax.training.objectives.rollouts import chosen_method, has_critic
from rmjax.training.rows import longest_row
from rmjax.training.step import MICROBATCH_LOOP


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
      name: what is done.
      own: bytes of a chip beside what is there at all times.
      peak: all bytes of a chip.
      fits: whether that is no more than the chip has.
      calls: how often its program runs in a step; for sampling, tokens of a sample.
      seconds: of a step, predicted; None if the compiler's program cannot be read.
    """

    name: str
    own: int
    peak: int
    fits: bool
    calls: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """What a step comes to; bytes are of one chip.

    Attributes:
      topology: name of the topology.
      mesh: sizes of the axes of the mesh of training.
      samples: responses of a step.
      load: how long they are, how many a prompt has and how many are made at once.
      reward: what the reward model was taken to be.
      parts: what lives when.
      phases: in their order.
      memory: bytes the chip has.
      sampling: more of sampling.
      update: more of an update.
      unread: why a program of the compiler's cannot be read, if so.
    """

    topology: str
    mesh: dict[str, int]
    samples: int
    load: SamplingLoad
    reward: str
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    memory: float
    sampling: SamplingReport
    update: Report
    unread: str

    @property
    def always(self) -> int:
        """Bytes of what is there at all times."""
        return sum(part.bytes for part in self.parts if part.when == ALWAYS)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return all(phase.fits for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Of a step, predicted; None if one of its phases is not."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None


def alignment_load(config: AlignConfig, load: SamplingLoad | None) -> SamplingLoad:
    """What a config samples: as long as it may be, unless `load` says how long.

    Raises:
      UserError: the config has no room for that.
    """
    rollout, data = config.rollout, config.data
    room = data.max_length - rollout.max_tokens
    found = load or SamplingLoad(room, rollout.max_tokens)
    if found.tokens > rollout.max_tokens or found.prompt + found.tokens > data.max_length:
        raise UserError(
            f"--sample: {found.prompt} + {found.tokens} tokens; the config has rollout.max_tokens "
            f"= {rollout.max_tokens} and data.max_length = {data.max_length}"
        )
    rows = min(rollout.rows, config.batch_size)
    return dataclasses.replace(found, n=rollout.n, rows=rows)


def check_alignment(
    config: AlignConfig, topology: str, mesh: Mesh, chip: Chip, load: SamplingLoad
) -> AlignmentReport:
    """Compiles the programs of a step for `mesh` and counts what they do.

    Raises:
      UserError: something does not divide over the mesh.
    """
    decoder, sharding = architecture(config), Sharding(mesh)
    kernel = choose(config.attention, decoder, sharding, dtype(config), longest_row(config))
    options = ModelOptions(sharding, dtype=dtype(config), remat=config.remat, attention=kernel)
    model = new_model(config, decoder, options)
    rewards, said = _reward(config, model)
    state = abstract_program(config, decoder, sharding, kernel)[1]
    critic = _critic(config, model, rewards)
    states = [state, *([critic_program(config, critic, 1).abstract] if critic else [])]
    parts = plan_memory(config, model, states, rewards)
    work = _workload(config, load)
    sampled = sampled_model(config, model)
    samples = check_sampling(
        decoder,
        topology,
        sampled.options.sharding.mesh,  # pyright: ignore[reportArgumentType]
        chip,
        load,
        lora=config.lora,
        count=config.batch_size // load.n,
    )
    updates = updates_of(config)
    parts_of_step = config.policy_gradient.minibatches
    one = dataclasses.replace(work, samples=config.batch_size // parts_of_step)
    update = check_program(config, topology, mesh, chip, one)
    made = [
        *_moving(sampled, state.params, chip),
        *_rewarding(rewards, _samples(config, load, spoken=False), load, chip),
        *_log_probabilities(config, model, state.params, critic, work, load, chip),
        *(_critic_updates(config, critic, one, updates, chip) if critic else ()),
    ]
    always = sum(part.bytes for part in parts if part.when == ALWAYS)
    of_sampling = sum(part.bytes for part in parts if part.when == SAMPLING)
    own = samples.temporaries + of_sampling
    ways = -(-config.batch_size // samples.rows)  # times that all rows are filled anew
    phases = [
        _phase("sampling", own, always, samples.fits, chip, load.tokens * ways,
               _sampling_seconds(samples, ways)),
        *(_compiled(name, found, has, calls, always, chip) for name, found, has, calls in made),
        _phase("update", update.peak - update.parameters - update.optimizer, always, update.fits,
               chip, updates, update.prediction and updates * update.seconds),
    ]  # fmt: skip
    unread = (samples.unread, update.unread, *(found.unread for _, found, _, _ in made))
    return AlignmentReport(
        topology=topology,
        mesh=dict(mesh.shape),
        samples=config.batch_size,
        load=load,
        reward=said,
        parts=parts,
        phases=tuple(sorted(phases, key=lambda phase: _ORDER.index(phase.name))),
        memory=chip.memory,
        sampling=samples,
        update=update,
        unread=next(filter(None, unread), ""),
    )


_VALUES, _CRITIC = "values of the critic", "update of the critic"
_ORDER = ("weights to sample with", "sampling", "rewards", "log-probabilities, policy",
          "log-probabilities, reference", _VALUES, "update", _CRITIC)  # fmt: skip

Made = tuple[str, Compiled, int, int]  # a program, its arguments that live anyway, and its calls


def _reward(config: AlignConfig, model: Model) -> tuple[list[Model], str]:
    """The reward models, and what the rewards were taken to be."""
    models, said = [], []
    for name, reward in config.rewards.items():
        if not reward.model:
            said.append(f"{name} is no model and takes no part of the chips' time")
        elif Path(reward.model).expanduser().exists():
            models.append(reward_model(reward.model, model))
            said.append(reward.model)
        else:
            models.append(Model(model.config, model.options, RewardHead(1)))
            assumed = "taken as the policy's architecture with one output"
            said.append(f"{reward.model} is not here: {assumed}")
    return models, "; ".join(said)


def _workload(config: AlignConfig, load: SamplingLoad) -> Workload:
    """A step's samples, as rows of training hold them: as many of a prompt as fit share it."""
    whole, shared = load.prompt + load.tokens, load.prompt - 1
    if not config.data.share_prompts:
        return Workload(config.batch_size, whole, predicted=load.tokens)
    together = max(1, min(load.n, (longest_row(config) - shared) // (whole - shared)))
    return Workload(config.batch_size, whole, shared, together, load.tokens)


def _samples(config: AlignConfig, load: SamplingLoad, spoken: bool = True) -> TokenizedData:
    """As many samples as a step has, all as long as `load` says, no two of them alike."""
    prompts = config.batch_size // load.n
    tokens, numbers = [], []
    for prompt in range(prompts):
        for sample in range(load.n):
            asked, said = np.full(load.prompt, prompt), np.full(load.tokens, prompts + sample)
            tokens.append(np.concatenate([asked, said]).astype(np.int32))
            numbers.append(prompt)
    own = [np.arange(load.prompt + load.tokens) >= load.prompt] * len(tokens)
    return in_memory(tokens, numbers, own if spoken else None)[0]


def _moving(sampled: Model, params: Params, chip: Chip) -> Iterator[Made]:
    """From the weights that are trained to those that sample."""
    wanted, leaves = changes(params, sampled.abstract(sampled.options.dtype)), flatten(params)
    if not wanted:
        return
    moving = {path: leaves[path] for path in wanted}
    mesh: Any = sampled.options.sharding.mesh
    found = compile_program(move_program(wanted).trace(moving), mesh, chip, {}, Steps())
    yield "weights to sample with", found, local_bytes(moving), 1


def _rewarding(
    rewards: Sequence[Model], data: TokenizedData, load: SamplingLoad, chip: Chip
) -> Iterator[Made]:
    """Scores of the samples by reward models, in the batches of `rmjax.load`."""
    for model in rewards:
        sharding, params = model.options.sharding, model.abstract(model.options.dtype)
        mesh: Any = sharding.mesh
        longest = max(int(data.lengths.max()), model.config.max_position_embeddings)
        for batches in ScoringShapes(model, longest).batches(data):
            rows = jax.tree.map(lambda x: x[0], batches[0].rows)
            score: Any = make_score(model)
            whole = load.prompt + load.tokens
            length = batches.shape.length
            together = max(1, min(load.n, (length - load.prompt) // load.tokens))
            group, places = (load.prompt, [whole] * together), load.prompt + together * load.tokens
            steps = kernel_steps(
                group, places, length, mesh.shape["context"], chip, model.config.windows
            )
            traced = score.trace(params, placed(rows, ROWS_AXES, sharding))
            found = compile_program(traced, mesh, chip, {}, steps)
            yield "rewards", found, local_bytes(params), len(batches)


def _log_probabilities(
    config: AlignConfig,
    model: Model,
    params: Params,
    critic: Model | None,
    work: Workload,
    load: SamplingLoad,
    chip: Chip,
) -> Iterator[Made]:
    """What policy, reference and critic say of the samples, in rows of training.

    A policy whose credits are fresh says it again before each update.
    """
    batches = StepRows(config, planned_shape(config, model)).whole(_samples(config, load))
    sharding, length = model.options.sharding, longest_row(config)
    mesh: Any = sharding.mesh
    context, first = mesh.shape["context"], batches[0]
    targets: Any = first.targets
    arrays = (first.rows, targets.responses.predicting)
    rows, places = placed(
        jax.tree.map(lambda x: x[0], arrays), (ROWS_AXES, ("row", "length")), sharding
    )
    steps = kernel_steps(work.group, work.group_places, length, context, chip, model.config.windows)
    trips = {CHUNK_LOOP: work.chunks(length, config.rows_per_device, context)}
    base = dataclasses.replace(model, lora=NO_LORA)
    kept = reference_shapes(model) or base.abstract(model.options.dtype)
    fresh = chosen_method(config.objective, config.policy_gradient).fresh
    times = 1 + fresh * config.policy_gradient.passes
    asked = [
        ("log-probabilities, policy", model, params, times),
        ("log-probabilities, reference", base, kept, 1),
        *([(_VALUES, critic, critic.abstract(), 1)] if critic else []),
    ]
    for name, of, own, often in asked:
        score: Any = make_token_scores(of)
        found = compile_program(score.trace(own, rows, places), mesh, chip, trips, steps)
        yield name, found, local_bytes(own), often * len(batches)


def _critic(config: AlignConfig, model: Model, rewards: Sequence[Model]) -> Model | None:
    """The critic of a method that has one: the reward model that it begins with, if it is here."""
    if not has_critic(config):
        return None
    if config.critic.init and Path(config.critic.init).expanduser().exists():
        return critic_model(reward_model(config.critic.init, model).config, model)
    return critic_model((rewards[0] if rewards else model).config, model)


def _critic_updates(
    config: AlignConfig, critic: Model, work: Workload, updates: int, chip: Chip
) -> Iterator[Made]:
    """Its updates, in the rows of the policy's."""
    sharding = critic.options.sharding
    batch, microbatches = abstract_batch(config, sharding, work)
    targets: Any = batch.targets
    old, _, returns, shares = targets.values
    batch = batch._replace(targets=targets._replace(values=TokenReturns(old, returns, shares)))
    mesh: Any = sharding.mesh
    context, program = mesh.shape["context"], critic_program(config, critic, 1)
    steps = kernel_steps(
        work.group, work.group_places, longest_row(config), context, chip, critic.config.windows
    )
    step: Any = program.step
    traced = step.trace(program.abstract, batch)
    found = compile_program(traced, mesh, chip, {MICROBATCH_LOOP: microbatches}, steps)
    yield _CRITIC, found, local_bytes(program.abstract), updates


def _compiled(name: str, found: Compiled, has: int, calls: int, always: int, chip: Chip) -> Phase:
    seconds = None if found.prediction is None else calls * found.prediction.step
    return _phase(name, max(0, found.peak - has), always, found.fits, chip, calls, seconds)


def _phase(
    name: str, own: int, always: int, fits: bool, chip: Chip, calls: int, seconds: float | None
) -> Phase:
    peak = always + own
    return Phase(name, own, peak, fits and peak <= chip.memory, calls, seconds)


def _sampling_seconds(report: SamplingReport, ways: int) -> float | None:
    """Of all samples, those of all rows together beginning and ending at once."""
    if report.chunk is None or report.prompts is None:
        return None
    once = report.tokens * report.seconds + report.calls * report.prompts.step
    return ways * once if math.isfinite(once) else None
