"""The parts of a step: samples of the current weights, their rewards, and rows of a fixed shape."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from rmjax.alignment.prompts import Prompts
from rmjax.alignment.rewards import Reward
from rmjax.alignment.rollouts import Rollout
from rmjax.alignment.weights import moved
from rmjax.config import AlignConfig
from rmjax.data.batches import Batches
from rmjax.data.planning import plan_rows
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenized import TokenizedData
from rmjax.data.tokenizer import Tokenizer
from rmjax.generation.completions import SamplingSettings
from rmjax.generation.policy import Policy
from rmjax.inference.batching import evaluation_batches
from rmjax.models.attention.dispatch import alignment, choose
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import Sharding, mesh_shape

_HELD_OUT = 2**32 - 1  # the step whose noise samples of held-out prompts have
_SEEDS = 1_000_003  # apart, those of two runs' steps
_PLACES_A_SLOT = 8


class Sampling:
    """The policy as it is, to sample from."""

    def __init__(
        self, config: AlignConfig, model: Model, tokenizer: Tokenizer, ends: tuple[int, ...]
    ):
        """Nothing is compiled yet.

        Args:
          config: of the run.
          model: that is trained.
          tokenizer: its.
          ends: tokens that end a sample.
        """
        self.model = sampled_model(config, model)
        self.settings, self._seed = config.rollout, config.seed
        self._policy = Policy(self.model, {}, tokenizer, ends, config.rollout.rows)
        self._wanted = self.model.abstract(self.model.options.dtype)

    def __call__(self, params: Params, prompts: Prompts, numbers: Any, n: int, step: int) -> Any:
        """The samples of some prompts; their noise goes by the seed, the step and the prompt."""
        settings = dataclasses.asdict(self.settings)
        del settings["rows"], settings["mesh"]
        settings |= {"n": n, "seed": (self._seed * _SEEDS + step) % 2**32}
        self._policy.params = moved(params, self._wanted)
        asked = [prompts.tokens[i] for i in numbers]
        found = self._policy(asked, SamplingSettings(**settings), [int(i) for i in numbers])
        # Those of the mesh of training are donated with the next update, others need their room.
        self._policy.params = {}
        return found


def sampled_model(config: AlignConfig, model: Model) -> Model:
    """The model that is trained, on the mesh that it samples on.

    That has the devices of the mesh of training in their order, so that weights go from one to the
    other within a program. Without a mesh of its own it is that of training, but for `context`: a
    row has one token at a time. Devices that shared its tokens hold what they held, and other rows.

    Raises:
      UserError: the sizes of `rollout.mesh` do not multiply to the devices.
    """
    options, llama = model.options, model.config
    mesh: Any = options.sharding.mesh
    sizes = dict(mesh.shape, fsdp=mesh.shape["fsdp"] * mesh.shape["context"], context=1)
    if config.rollout.mesh is not None:
        sizes = mesh_shape(config.rollout.mesh, mesh.size)
    devices = mesh.devices.reshape(*sizes.values())
    sharding = Sharding(Mesh(devices, tuple(sizes), axis_types=mesh.axis_types))
    kernel = choose(config.attention, llama, sharding, options.dtype)
    sampled = ModelOptions(sharding, dtype=options.dtype, attention=kernel)
    return Model(llama, sampled, model.head, model.lora)


def make_rollout(
    sampling: Sampling,
    params: Params,
    prompts: Prompts,
    numbers: Int64[np.ndarray, "P"],
    reward: Reward,
    n: int,
    step: int,
) -> Rollout:
    """Samples of a step and their rewards."""
    completions = sampling(params, prompts, numbers, n, step)
    texts = [[completion.text for completion in samples] for samples in completions]
    rewards, attributes = reward([prompts.conversations[i] for i in numbers], texts)
    return Rollout(numbers, completions, rewards, attributes)


def held_out_rollout(
    sampling: Sampling, params: Params, prompts: Prompts, reward: Reward
) -> Rollout:
    """One sample of each prompt with its reward, the noise the same whenever it is asked."""
    return make_rollout(sampling, params, prompts, np.arange(len(prompts)), reward, 1, _HELD_OUT)


class StepRows:
    """Rows and micro-batches of one shape, whatever a step's samples are like.

    The update is compiled once. Micro-batches that a step does not need are not computed.
    """

    def __init__(self, config: AlignConfig, model: Model):
        """Takes the shape from the config."""
        self._packing, self._share = config.data.packing, config.data.share_prompts
        length, rows = config.row_length, config.rows_per_device * model.options.sharding.row_shards
        slots = max(config.rollout.n, min(64, length // _PLACES_A_SLOT))
        self.shape = RowShape(rows, length, slots, alignment(model.options.attention, length))
        # At worst every sample has a row of its own.
        samples = config.batch_size // config.policy_gradient.minibatches
        self._microbatches = -(-samples // rows)

    def whole(self, data: TokenizedData) -> Batches:
        """Every sample once, a micro-batch a step, to score."""
        return evaluation_batches(data, self.shape, packing=self._packing, share=self._share)

    def update(self, data: TokenizedData) -> Batches:
        """Every sample once, in one step of several micro-batches, to learn from."""
        samples = np.arange(len(data))
        rows = plan_rows(data, samples, self.shape, packing=self._packing, share=self._share)
        return Batches(data, [rows], self.shape, self._share, self._microbatches)


def reward_of(rollout: Rollout) -> dict[str, float]:
    """What there is to say of samples of held-out prompts."""
    return {
        "held_out/reward": float(np.nanmean(rollout.rewards)),
        "held_out/length": float(rollout.lengths.mean()),
        "held_out/ended": float(rollout.ended.mean()),
    }
