"""Sampling, compiled for chips that need not exist: bytes, and tokens a second.

Every token reads the weights and all that is kept, so the memory's bandwidth bounds it. Compiled
are the programs that `rmjax.sample` runs: a chunk of tokens, with the cache as large as it gets,
and the rows of prompts before it.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rmjax.aot.attention_cost import Steps, kernel_steps
from rmjax.aot.compiled import compile_program
from rmjax.aot.hardware import Chip
from rmjax.aot.roofline import Prediction
from rmjax.data.row_layout import make_rows, segment_length
from rmjax.errors import UserError
from rmjax.generation.choice import make_rule
from rmjax.generation.policy import ROWS
from rmjax.generation.programs import (
    CHUNK,
    ROW_STATES_AXES,
    TOKEN_LOOP,
    RowStates,
    Shape,
    cache_shapes,
)
from rmjax.generation.sampler import Sampler
from rmjax.models.attention.dispatch import choose
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.heads import language_model_head
from rmjax.models.inputs import ROWS_AXES
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.sharding import MeshConfig, Sharding, local_bytes

_DTYPE = jnp.bfloat16
_RULE = make_rule(temperature=0.7, top_p=0.9, top_k=0)  # what costs most: it draws and leaves out


@dataclasses.dataclass(frozen=True)
class SamplingLoad:
    """What is sampled.

    Attributes:
      prompt: tokens of a prompt.
      tokens: of a sample, without its prompt.
      n: samples of a prompt.
      rows: samples made at once, over all chips.
    """

    prompt: int
    tokens: int
    n: int = 1
    rows: int = ROWS


@dataclasses.dataclass(frozen=True)
class SamplingReport:
    """What sampling comes to; bytes are of one chip.

    Attributes:
      topology: name of the topology.
      mesh: sizes of the axes.
      attention: what computes prompts, see `dispatch.KERNELS`.
      shape: of the cache.
      weights: bytes, in bfloat16 but for norms.
      cache: bytes, at its largest.
      temporaries: bytes of everything else; the smaller cache while it is copied to a larger one.
      peak: bytes of all of it.
      memory: bytes the chip has.
      fits: whether the compiler accepts the programs and the chip has room for them.
      read: bytes of weights and cache that every token needs.
      bound: seconds that reading them takes at the memory's bandwidth: no token is faster.
      chunk: FLOPs, traffic and time of `programs.CHUNK` tokens of every row; None if it does not
        fit, or cannot be read.
      prompts: likewise, of one call that computes prompts.
      prompts_at_once: how many these are.
      calls: how many such calls the rows' prompts need.
      tokens: of a sample.
      unread: why the compiler's programs cannot be read, if so.
      compile_seconds: what it took.
    """

    topology: str
    mesh: dict[str, int]
    attention: str
    shape: Shape
    weights: int
    cache: int
    temporaries: int
    peak: int
    memory: float
    fits: bool
    read: int
    bound: float
    chunk: Prediction | None
    prompts: Prediction | None
    prompts_at_once: int
    calls: int
    tokens: int
    unread: str
    compile_seconds: float

    @property
    def rows(self) -> int:
        """Samples made at once."""
        return self.shape.groups * self.shape.members

    @property
    def seconds(self) -> float:
        """The predicted time of one token of every row."""
        return math.inf if self.chunk is None else self.chunk.step / CHUNK

    @property
    def of_bound(self) -> float:
        """Share of the memory's bandwidth that reads what every token needs."""
        return self.bound / self.seconds

    @property
    def decoded(self) -> float:
        """Tokens a second, of all rows together, prompts left out."""
        return self.rows / self.seconds

    @property
    def sampled(self) -> float:
        """Tokens a second, with the time that the rows' prompts take."""
        before = math.inf if self.prompts is None else self.calls * self.prompts.step
        return self.rows * self.tokens / (self.tokens * self.seconds + before)


def parse_sampling(text: str) -> SamplingLoad:
    """A load from a command line: `prompt:180,tokens:500,n:10,rows:512`.

    Raises:
      UserError: it is none.
    """
    try:
        parts = (part.split(":") for part in text.split(","))
        load = SamplingLoad(**{name: int(number) for name, number in parts})
    except (ValueError, TypeError) as error:
        raise UserError(f"--sample={text}: expected {_expected()}") from error
    if min(dataclasses.astuple(load)) < 1:
        raise UserError(f"--sample={text}: expected {_expected()}, each 1 or more")
    return load


def _expected() -> str:
    return "prompt:COUNT,tokens:COUNT, and perhaps n:COUNT (of a prompt) and rows:COUNT (at once)"


def sampling_mesh(decoder: DecoderConfig, devices: int) -> MeshConfig:
    """Heads over as many devices as divide the kv heads, and copies of that for the rows.

    So each device reads the fewest weights, and none are gathered.
    """
    tensor = math.gcd(decoder.num_key_value_heads, devices)
    return MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)


def check_sampling(
    decoder: DecoderConfig,
    topology: str,
    mesh: Mesh,
    chip: Chip,
    load: SamplingLoad,
    *,
    lora: LoraConfig = NO_LORA,
    count: int = 0,
) -> SamplingReport:
    """Compiles sampling from a model in bfloat16 for `mesh` and counts what it does.

    Args:
      decoder: the model.
      topology: its name, for the report.
      mesh: of its devices.
      chip: which they are.
      load: what is sampled.
      lora: adapters that the model has.
      count: of prompts; 0 for always more than are sampled at once.

    Raises:
      UserError: something does not divide over the mesh, or the model's context is too short.
    """
    began = time.monotonic()
    if load.prompt + load.tokens > decoder.max_position_embeddings:
        raise UserError(
            f"--sample: {load.prompt} + {load.tokens} tokens, and the model's context has "
            f"{decoder.max_position_embeddings}"
        )
    sharding = Sharding(mesh)
    kernel = choose("auto", decoder, sharding, _DTYPE)
    options = ModelOptions(sharding, dtype=_DTYPE, attention=kernel)
    model = Model(decoder, options, language_model_head(decoder), lora)
    sampler, params = Sampler(model, load.rows), model.abstract(_DTYPE)
    places = load.prompt - 1  # of a prompt: its last token is read with the sample
    several = [places] * (count or 2 * load.rows)
    first = sampler.cache_shape(several, load.n)
    shape = dataclasses.replace(first, slots=sampler.most_slots(load.tokens))
    chunk = compile_program(
        _trace_chunk(sampler, params, model, shape), mesh, chip, {TOKEN_LOOP: CHUNK}, Steps()
    )

    traced, at_once, steps = _trace_prompts(sampler, params, model, shape, several, chip)
    prompts = compile_program(traced, mesh, chip, {}, steps)

    weights = local_bytes(params)
    cache = local_bytes(cache_shapes(model, shape))
    looked_up = 0 if decoder.tie_word_embeddings else local_bytes(params["embed"])
    peak = max(chunk.peak, prompts.peak, weights + cache + _before(model, shape, first))
    read = weights - looked_up + cache
    return SamplingReport(
        topology=topology,
        mesh=dict(mesh.shape),
        attention=kernel,
        shape=shape,
        weights=weights,
        cache=cache,
        temporaries=max(0, peak - weights - cache),
        peak=peak,
        memory=chip.memory,
        fits=chunk.fits and prompts.fits and peak <= chip.memory,
        read=read,
        bound=read / chip.memory_bandwidth,
        chunk=chunk.prediction,
        prompts=prompts.prediction,
        prompts_at_once=at_once,
        calls=-(-min(len(several), math.ceil(shape.groups * shape.members / load.n)) // at_once),
        tokens=load.tokens,
        unread=chunk.unread or prompts.unread,
        compile_seconds=time.monotonic() - began,
    )


def _trace_chunk(sampler: Sampler, params: Params, model: Model, shape: Shape) -> jax.stages.Traced:
    """The program of a chunk of tokens, with the shapes of its arguments."""
    size = (shape.groups, shape.members)
    dtypes = {"prompt_key": np.uint32, "running": np.bool_}
    states = RowStates._make(
        np.zeros(size, dtypes.get(name, np.int32)) for name in RowStates._fields
    )
    now = placed(states, ROW_STATES_AXES, model.options.sharding)
    sample: Any = sampler.programs.sample
    ends, cache = np.zeros(2, np.int32), cache_shapes(model, shape)
    return sample.trace(params, cache, now, np.int32(0), np.uint32(0), ends, _RULE)


def _trace_prompts(
    sampler: Sampler,
    params: Params,
    model: Model,
    shape: Shape,
    places: Sequence[int],
    chip: Chip,
) -> tuple[jax.stages.Traced, int, Steps]:
    """The program of a call that computes prompts, all of so many places; how many; its steps."""
    sharding, rows = model.options.sharding, sampler.prompt_rows(places)
    segment = max(1, segment_length(places[:1], 0, rows.align))
    laid = placed(make_rows([], rows.rows, rows), ROWS_AXES, sharding)
    source = jax.ShapeDtypeStruct(
        (shape.groups, shape.places), np.int32, sharding=sharding.activation(("row", "place"))
    )
    insert: Any = sampler.programs.insert
    traced = insert.trace(params, cache_shapes(model, shape), laid, source)
    steps = kernel_steps((0, [places[0]]), segment, rows.length, 1, chip, model.config.windows)
    return traced, rows.rows * min(rows.slots, rows.length // segment), steps


def placed(arrays: Any, axes: Any, sharding: Sharding) -> Any:
    """Shapes and shardings of arrays whose axes are named."""

    def shape(array: np.ndarray, names: Sequence[str]) -> jax.ShapeDtypeStruct:
        placed = sharding.activation(names)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)

    return jax.tree.map(shape, arrays, axes, is_leaf=lambda x: isinstance(x, np.ndarray))


def _before(model: Model, shape: Shape, first: Shape) -> int:
    """Bytes of the cache from which the largest one is copied; 0 if it is the first."""
    if shape.slots == first.slots:
        return 0
    slots = first.slots
    while 2 * slots < shape.slots:
        slots *= 2
    return local_bytes(cache_shapes(model, dataclasses.replace(shape, slots=slots)))
