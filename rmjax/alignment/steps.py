"""The parts of a step: samples of the current weights, their rewards, and rows of a fixed shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from rmjax.alignment.prompts import Prompts, plan_prompts
from rmjax.alignment.rewards import Reward
from rmjax.alignment.rollouts import Rollout
from rmjax.alignment.weights import moved
from rmjax.config import AlignConfig
from rmjax.data.batches import Batches
from rmjax.data.planning import plan_rows
from rmjax.data.row_choice import choose_shapes
from rmjax.data.row_layout import RowShape, segment_length
from rmjax.data.tokenized import TokenizedData, in_memory
from rmjax.data.tokenizer import Tokenizer
from rmjax.generation.completions import Completion, SamplingSettings
from rmjax.generation.policy import Policy
from rmjax.inference.batching import evaluation_batches
from rmjax.models.attention.dispatch import alignment, choose
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import Sharding, mesh_shape
from rmjax.training.rows import Recorded, longest_row, recorded_shapes, row_limits

HELD_OUT = 2**32 - 1  # the step whose noise samples of held-out prompts have
_SEEDS = 1_000_003  # apart, those of two runs' steps
_PLACES_A_SLOT = 8
_PARTS = (1, 2, 4, 8)  # of `max_tokens`: samples that rows are chosen for
_FEWER = 4  # the part of the places at once that will do: steps may become short


class Sampler(Protocol):
    """Whatever samples in a step: the policy in this process, or a server.

    Attributes:
      weights: how many steps had made those weights that sampled last.
    """

    weights: int

    def __call__(
        self, params: Params, prompts: Prompts, numbers: Any, n: int, step: int, done: int
    ) -> list[list[Completion]]:
        """The samples of some prompts; their noise goes by the seed, the step and the prompt.

        Args:
          params: of the policy as it is.
          prompts: of the run.
          numbers: of those that are asked.
          n: samples of each.
          step: whose noise it is, or `HELD_OUT`.
          done: how many steps have made the policy what it is.
        """
        ...


class Sampling:
    """The policy as it is, to sample from, which is a `Sampler`."""

    def __init__(
        self,
        config: AlignConfig,
        model: Model,
        tokenizer: Tokenizer,
        ends: tuple[int, ...],
        prompts: Sequence[np.ndarray],
    ):
        """Nothing is compiled yet.

        Args:
          config: of the run.
          model: that is trained.
          tokenizer: its.
          ends: tokens that end a sample.
          prompts: tokens of all that it will be asked.
        """
        self.model = sampled_model(config, model)
        self._config, self.weights = config, 0
        places = [len(asked) - 1 for asked in prompts]
        self._policy = Policy(self.model, {}, tokenizer, ends, config.rollout.rows, usual=places)
        self._wanted = self.model.abstract(self.model.options.dtype)

    def __call__(
        self, params: Params, prompts: Prompts, numbers: Any, n: int, step: int, done: int
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        self._policy.params = moved(params, self._wanted)
        asked = [prompts.tokens[i] for i in numbers]
        settings = sampling_settings(self._config, n, step)
        found = self._policy(asked, settings, [int(i) for i in numbers])
        # Those of the mesh of training are donated with the next update, others need their room.
        self._policy.params = {}
        self.weights = done
        return found


def sampled_model(config: AlignConfig, model: Model) -> Model:
    """The model that is trained, on the mesh that it samples on.

    That has the devices of the mesh of training in their order, so that weights go from one to the
    other within a program. Without a mesh of its own it is that of training, but for `context`: a
    row has one token at a time. Devices that shared its tokens hold what they held, and other rows.

    Raises:
      UserError: the sizes of `rollout.mesh` do not multiply to the devices.
    """
    options, decoder = model.options, model.config
    mesh: Any = options.sharding.mesh
    sizes = dict(mesh.shape, fsdp=mesh.shape["fsdp"] * mesh.shape["context"], context=1)
    if config.rollout.mesh is not None:
        sizes = mesh_shape(config.rollout.mesh, mesh.size)
    devices = mesh.devices.reshape(*sizes.values())
    sharding = Sharding(Mesh(devices, tuple(sizes), axis_types=mesh.axis_types))
    kernel = choose(config.attention, decoder, sharding, options.dtype)
    sampled = ModelOptions(sharding, dtype=options.dtype, attention=kernel)
    return Model(decoder, sampled, model.head, model.lora)


def sampling_settings(config: AlignConfig, n: int, step: int) -> SamplingSettings:
    """What is sampled: `n` of each prompt with the noise of a step, the rest as the config says."""
    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    settings: dict[str, Any] = {
        name: getattr(config.rollout, name) for name in names if name != "seed"
    }
    settings |= {"n": n, "seed": (config.seed * _SEEDS + step) % 2**32}
    return SamplingSettings(**settings)


def make_rollout(
    sampling: Sampler,
    params: Params,
    prompts: Prompts,
    numbers: Int64[np.ndarray, "P"],
    n: int,
    step: int,
) -> Rollout:
    """Samples of a step, which have no rewards yet."""
    return _sampled(numbers, n, sampling, sampling(params, prompts, numbers, n, step, step - 1))


def held_out_rollout(sampling: Sampler, params: Params, prompts: Prompts, done: int) -> Rollout:
    """One sample of each prompt after so many steps, the noise the same whenever it is asked."""
    numbers = np.arange(len(prompts))
    return _sampled(numbers, 1, sampling, sampling(params, prompts, numbers, 1, HELD_OUT, done))


def _sampled(
    numbers: Int64[np.ndarray, "P"], n: int, sampling: Sampler, found: list[list[Completion]]
) -> Rollout:
    unknown = np.full((len(numbers), n), np.nan)
    return Rollout(numbers, found, unknown, rewarded=False, weights=sampling.weights)


def with_rewards(rollout: Rollout, prompts: Prompts, reward: Reward) -> Rollout:
    """The same samples with their rewards.

    Raises:
      UserError: what rewards fails.
    """
    asked = [prompts.conversations[i] for i in rollout.numbers]
    texts = [[completion.text for completion in samples] for samples in rollout.completions]
    rewards, attributes = reward(asked, texts)
    return dataclasses.replace(rollout, rewards=rewards, attributes=attributes, rewarded=True)


class StepRows:
    """Rows and micro-batches of one shape, whatever a step's samples are like.

    The update is compiled once. Micro-batches that a step does not need are not computed.
    """

    def __init__(self, config: AlignConfig, shape: RowShape):
        """Takes the shape, see `step_shape`."""
        self._packing, self._share = config.data.packing, config.data.share_prompts
        self.shape = shape
        # At worst every sample has a row of its own.
        samples = config.batch_size // config.policy_gradient.minibatches
        self._microbatches = -(-samples // shape.rows)

    def whole(self, data: TokenizedData) -> Batches:
        """Every sample once, a micro-batch a step, to score."""
        return evaluation_batches(data, self.shape, packing=self._packing, share=self._share)

    def update(self, data: TokenizedData) -> Batches:
        """Every sample once, in one step of several micro-batches, to learn from."""
        samples = np.arange(len(data))
        rows = plan_rows(data, samples, self.shape, packing=self._packing, share=self._share)
        return Batches(data, [rows], self.shape, self._share, self._microbatches)


def shape_of(config: AlignConfig, model: Model, rows: int, length: int) -> RowShape:
    """The shape of so many rows of a length."""
    slots = max(config.rollout.n, min(64, length // _PLACES_A_SLOT))
    return RowShape(rows, length, slots, alignment(model.options.attention, length, model.config))


def planned_shape(config: AlignConfig, model: Model) -> RowShape:
    """The shape that the config says, or with which memory is planned; see `longest_row`."""
    rows = config.rows_per_device * model.options.sharding.row_shards
    return shape_of(config, model, rows, longest_row(config))


def step_shape(
    config: AlignConfig,
    model: Model,
    prompts: Prompts,
    recorded: Recorded | None = None,
) -> RowShape:
    """The shape of a run's rows: the config's, or chosen for its prompts.

    Nobody knows how long samples will be, and they change while a policy learns. So it is chosen
    for a few steps with samples of several lengths, however many steps a run has. There is one
    shape, since each is several programs here. See `run_shapes` for `recorded`.
    """
    if config.data.row_length:
        return planned_shape(config, model)
    limits, rollout = row_limits(config, model, part=_FEWER), config.rollout

    def made(rows: int, length: int) -> RowShape:
        return shape_of(config, model, rows, length)

    most = max(map(len, prompts.tokens)) + rollout.max_tokens
    align = alignment(model.options.attention, 2 * longest_row(config), model.config)
    longest = segment_length([most], 0, align)
    known = recorded_shapes(recorded, longest, limits, made)
    if known:
        return known[0]
    each = config.batch_size // rollout.n
    plan = plan_prompts(len(prompts), each=each, seed=config.seed, steps=max(_PARTS))
    tokens, of, spoken = [], [], []
    for part in _PARTS:  # more steps of shorter samples: as many tokens
        length = max(1, rollout.max_tokens // part)
        for step, numbers in enumerate(plan[:part]):
            for number in numbers.tolist():
                asked = prompts.tokens[number]
                for sample in range(rollout.n):
                    said = np.full(length, -1 - sample)  # no two of a prompt share any of it
                    tokens.append(np.concatenate([asked, said]).astype(np.int32))
                    spoken.append(np.arange(len(tokens[-1])) >= len(asked))
                    of.append((part, step, number))
    data = in_memory(tokens, of, spoken)[0]
    updates = config.batch_size // config.policy_gradient.minibatches
    steps = np.split(np.arange(len(data)), range(updates, len(data), updates))
    (shape,) = choose_shapes(
        data,
        steps,
        longest,
        limits,
        made,
        packing=config.data.packing,
        share=config.data.share_prompts,
        most=1,
    )
    return shape


def reward_of(rollout: Rollout) -> dict[str, float]:
    """What there is to say of samples of held-out prompts."""
    return {
        "held_out/reward": float(np.nanmean(rollout.rewards)),
        **{f"held_out/{name}": mean for name, mean in single_rewards(rollout).items()},
        "held_out/length": float(rollout.lengths.mean()),
        "held_out/ended": float(rollout.ended.mean()),
    }


def single_rewards(rollout: Rollout) -> dict[str, float]:
    """The mean of each reward of several, and of each attribute, over the samples that have it."""
    samples = [found for row in rollout.attributes or () for found in row if found]
    names = dict.fromkeys(name for found in samples for name in found)
    return {
        f"reward/{name}": float(np.mean([found[name] for found in samples if name in found]))
        for name in names
    }
