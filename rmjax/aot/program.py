"""The training step of a config, compiled for chips that need not exist, and what it comes to."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from rmjax.aot.attention_cost import kernel_steps
from rmjax.aot.compiled import compile_program
from rmjax.aot.hardware import CHIPS, Chip, gpu_target
from rmjax.aot.roofline import Prediction
from rmjax.checkpoints.pretrained import open_pretrained
from rmjax.config import AlignConfig, Config
from rmjax.data.batch import (
    Batch,
    Pairs,
    PolicyTargets,
    Ratings,
    Responses,
    Rollouts,
    Targets,
    batch_axes,
)
from rmjax.data.planning import slots_for
from rmjax.data.tokenized import TokenValues
from rmjax.errors import UserError
from rmjax.models.attention.dispatch import choose
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.flops import model_flops
from rmjax.models.heads import head_outputs
from rmjax.models.inputs import Rows
from rmjax.models.layers import ModelOptions
from rmjax.models.log_probabilities import CHUNK_LOOP, chunk_size
from rmjax.runtime.sharding import Sharding, check_divisible, local_bytes
from rmjax.training.experiment import config_objective, new_head, new_model
from rmjax.training.objectives.objective import is_policy
from rmjax.training.optimizer import partition
from rmjax.training.rows import longest_row
from rmjax.training.step import MICROBATCH_LOOP, TrainState, make_program


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step comes to; bytes and FLOPs are of one chip unless said otherwise.

    Attributes:
      topology: name of the topology.
      mesh: sizes of the axes.
      remat: policy.
      attention: what computes it, see `dispatch.KERNELS`.
      steps_taken: the share of its steps that a kernel takes; 0 if it is none of ours.
      rows: rows computed at once, over all chips.
      microbatches: of a step.
      tokens: real tokens of a step.
      parameters: bytes; float32, but what LoRA freezes.
      optimizer: bytes of its state.
      gradients: bytes; part of the temporaries.
      temporaries: bytes of everything else that lives during a step.
      peak: bytes of all of it, as the compiler lays it out.
      memory: bytes the chip has.
      model_flops: of the step, over all chips; see `flops.model_flops`.
      fits: whether the compiler accepts the program and the chip has room for it.
      prediction: FLOPs, traffic and time; None if it does not fit, or cannot be read.
      unread: why the compiler's program cannot be read, if so.
      compile_seconds: what it took.
    """

    topology: str
    mesh: dict[str, int]
    remat: str
    attention: str
    steps_taken: float
    rows: int
    microbatches: int
    tokens: int
    parameters: int
    optimizer: int
    gradients: int
    temporaries: int
    peak: int
    memory: float
    model_flops: float
    fits: bool
    prediction: Prediction | None
    unread: str
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """The predicted time of a step; infinite if there is no prediction."""
        return math.inf if self.prediction is None else self.prediction.step

    def mfu(self, chip: Chip) -> float:
        """Predicted share of the chips' peak that real tokens' model FLOPs make up."""
        assert self.prediction is not None
        chips = math.prod(self.mesh.values())
        return self.model_flops / (self.prediction.step * chips * chip.flops)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step has to compute.

    Attributes:
      samples: responses a step.
      tokens: mean tokens of a sample: prompt and response.
      prompt: how many of them are the prompt's, computed once for all its responses; 0 if each
        response is computed with its own.
      responses: to a prompt.
      predicted: tokens of a sample that a policy learns to predict, the first of those that are its
        own; 0 for a reward model.
    """

    samples: int
    tokens: int
    prompt: int = 0
    responses: int = 1
    predicted: int = 0

    @property
    def group(self) -> tuple[int, list[int]]:
        """A prompt with its responses, as `flops.model_flops` wants it."""
        return self.prompt, [self.tokens] * self.responses

    @property
    def group_places(self) -> int:
        """Token places that a prompt with its responses takes."""
        return self.prompt + self.responses * (self.tokens - self.prompt)

    @property
    def groups(self) -> int:
        """Prompts a step."""
        return -(-self.samples // self.responses)

    def rows(self, length: int) -> int:
        """Rows they fill, packed without a gap; a prompt and its responses stay together."""
        return -(-self.groups // max(1, length // self.group_places))

    def read(self, groups: int) -> int | None:
        """Places of so many groups that the head reads, as `flops.model_flops` wants it."""
        return self.predicted * self.responses * groups if self.predicted else None

    def chunks(self, length: int, rows: int, context: int) -> int:
        """Chunks of predicting places that the busiest device computes of so many full rows."""
        own = self.tokens - self.prompt
        group = np.arange(self.group_places) - self.prompt
        predicting = (group >= 0) & (group % own < self.predicted)
        row = np.tile(predicting, max(1, length // self.group_places))
        row = np.pad(row, (0, max(0, length - len(row))))[:length]
        most = max(int(part.sum()) for part in np.array_split(row, context))
        return -(-rows * most // chunk_size(rows * length // context))


def topology_devices(name: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """The devices of a topology such as `v5p:4x4x4` or `h100:8`, which need not exist.

    Raises:
      UserError: no such topology, or no compiler for it.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        raise UserError(
            f"--topology={name}: expected CHIP:SIZES, such as v5p:4x4x4 or h100:8 (GPUs of a host) "
            f"or h100:2x8 (hosts x GPUs); chips: {', '.join(CHIPS)}"
        )
    try:
        if chip.torus:
            options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                topology=f"1x{shape}" if "x" in shape else f"1x1x{shape}",
                target_config=gpu_target(chip),
            )
    except Exception as error:  # whatever the plugin raises
        needed = "rmjax[aot]" if chip.torus else "rmjax[cuda13]"
        raise UserError(
            f"--topology={name}: the compiler has no such topology, or there is no compiler (pip "
            f"install '{needed}'): {str(error).splitlines()[0][:300]}"
        ) from error
    return list(found.devices), chip


def architecture(config: Config) -> DecoderConfig:
    """The config's own statement of the model, else that of its first weights."""
    return config.model or open_pretrained(config.init).decoder


def check_program(config: Config, topology: str, mesh: Mesh, chip: Chip, load: Workload) -> Report:
    """Compiles the training step of `config` for `mesh` and counts what it does.

    Raises:
      UserError: something does not divide over the mesh.
    """
    began = time.monotonic()
    sharding, decoder = Sharding(mesh), architecture(config)
    kernel = choose(config.attention, decoder, sharding, dtype(config), longest_row(config))
    step, state = abstract_program(config, decoder, sharding, kernel)
    batch, microbatches = abstract_batch(config, sharding, load)
    context = mesh.shape["context"]
    trips = {
        MICROBATCH_LOOP: microbatches,
        CHUNK_LOOP: load.chunks(longest_row(config), config.rows_per_device, context),
    }
    steps = kernel_steps(
        load.group, load.group_places, longest_row(config), context, chip, decoder.windows
    )
    made = compile_program(step.trace(state, batch), mesh, chip, trips, steps)
    parts = state_bytes(state, config.trained)
    return Report(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=config.remat,
        attention=kernel,
        steps_taken=steps.taken if kernel == "splash" else 0.0,
        rows=batch.rows.tokens.shape[1],
        microbatches=microbatches,
        tokens=load.groups * load.group_places,
        **parts,
        temporaries=max(0, made.peak - sum(parts.values())),
        peak=made.peak,
        memory=chip.memory,
        model_flops=model_flops(
            decoder,
            head_outputs(decoder, new_head(config, decoder)),
            [load.group] * load.groups,
            training=True,
            lora=config.lora,
            read=load.read(load.groups),
        ),
        fits=made.fits,
        prediction=made.prediction,
        unread=made.unread,
        compile_seconds=time.monotonic() - began,
    )


def abstract_program(
    config: Config, decoder: DecoderConfig, sharding: Sharding, attention: str = "xla"
) -> tuple[Any, TrainState]:
    """The training step of `config`, not yet traced, and the shapes of its state.

    Attention is computed as `attention` says, a key of `dispatch.KERNELS`.

    Raises:
      UserError: something does not divide over the mesh.
    """
    options = ModelOptions(sharding, dtype=dtype(config), remat=config.remat, attention=attention)
    program = make_program(
        new_model(config, decoder, options),
        config_objective(config),
        config.optimizer,
        steps=config.steps or 1,
        trainable=config.trained,
        seed=config.seed,
    )
    return program.step, program.abstract


def dtype(config: Config) -> Any:
    """That of the computation on accelerators."""
    return jnp.dtype("float32" if config.dtype == "float32" else "bfloat16")


def abstract_batch(config: Config, sharding: Sharding, load: Workload) -> tuple[Batch, int]:
    """Shapes and shardings of a step's batch, and how many of its micro-batches hold anything."""
    length = longest_row(config)
    rows = config.rows_per_device * sharding.row_shards
    check_divisible(
        "rows of config.data.row_length", (rows, length), sharding.activation(("row", "length"))
    )
    count = -(-load.rows(length) // rows)
    slots = max(load.responses, 2)
    if config.data.packing:
        slots = slots_for(length, load.group_places / load.responses)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, rows, *shape), jnp.int32)

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, rows, *shape), jnp.float32)

    pair = slots // 2
    pairs = Pairs(ints(pair), ints(pair), floats(pair), floats(pair))
    predicting: Any = jax.ShapeDtypeStruct((count, rows, length), jnp.bool_)
    if isinstance(config, AlignConfig):
        targets = Rollouts(predicting, ints(length), TokenValues._make([floats(length)] * 4))
    elif is_policy(config.objective):
        responses: Any = (predicting, *[floats(slots)] * 3)
        targets = PolicyTargets(Responses._make(responses), pairs)
    else:
        labels = floats(slots, len(config.data.attributes))
        targets = Targets(Ratings(labels, labels), pairs)
    batch = Batch(
        Rows._make([ints(length)] * 5 + [ints(slots)]),
        targets,
        ints(slots),
        jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore[reportArgumentType]
    )
    placed = jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.activation(names)
        ),
        batch,
        batch_axes(batch),
    )
    return placed, count


def state_bytes(state: TrainState, trainable: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the state's parts on one device, from shapes and shardings."""
    free, _ = partition(state.params, trainable)
    return {
        "parameters": local_bytes(state.params),
        "optimizer": local_bytes(state.opt_state),
        "gradients": local_bytes(free),
    }
