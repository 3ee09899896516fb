"""A model's parameters onto a mesh: each process reads what its own devices hold, once."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax.checkpoints.hf_mapping import from_hf, hf_index, hf_keys
from rmjax.checkpoints.hf_weights import Weights, check_tensors
from rmjax.checkpoints.orbax_arrays import cause, open_array
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.tensor_slices import SLICE_BYTES, band_axis, cut
from rmjax.errors import UserError
from rmjax.models.heads import LanguageModelHead
from rmjax.models.init import random_head, random_leaves
from rmjax.models.lora import merge_adapters
from rmjax.models.model import Model
from rmjax.models.parameters import (
    HEAD,
    LM_HEAD,
    TABLE,
    Parameter,
    Params,
    adapter_parameters,
    flatten,
    nest,
)

Bounds = tuple[tuple[int, int], ...]  # a block of an array: start and stop of each axis
_THREADS = 4


def load_parameter(
    weights: Weights,
    row: Parameter,
    keys: Sequence[str],
    wanted: jax.ShapeDtypeStruct,
    sizes: Mapping[str, int],
) -> jax.Array:
    """Reads a parameter onto the mesh of `wanted`.

    Args:
      weights: what to read from.
      row: the parameter.
      keys: its HF keys, in the order of the layers.
      wanted: shape, dtype and sharding of the result.
      sizes: of every axis.
    """
    assert wanted.sharding is not None
    indices = wanted.sharding.addressable_devices_indices_map(wanted.shape).values()
    shards = read_shards(weights, row, keys, wanted, sizes, indices)
    return jax.make_array_from_callback(
        wanted.shape, wanted.sharding, lambda index: shards[bounds(index, wanted.shape)]
    )


def read_shards(
    weights: Weights,
    row: Parameter,
    keys: Sequence[str],
    wanted: jax.ShapeDtypeStruct,
    sizes: Mapping[str, int],
    indices: Iterable[Any],
) -> dict[Bounds, np.ndarray]:
    """The blocks of a parameter at `indices`; the other arguments are those of `load_parameter`.

    Blocks that tile a larger one, as those of a process's devices mostly do, are read as that
    one, and a block that several devices hold is read once. Besides the result, a few slices of
    `SLICE_BYTES` are in memory.
    """
    blocks = {bounds(index, wanted.shape) for index in indices}
    shards = {block: np.empty([b - a for a, b in block], wanted.dtype) for block in blocks}
    around = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*blocks))
    tiled = _volume(around) == sum(map(_volume, blocks))
    jobs = [
        (layer, band)
        for region in ([around] if tiled else sorted(blocks))
        for layer, band in _bands(row, region, weights.dtype(keys[0]).itemsize)
    ]

    def read(job: tuple[int, Bounds]) -> None:
        layer, band = job
        index = {axis: slice(*span) for axis, span in zip(row.axes.split(), band)}
        own = {**sizes, **{axis: b - a for axis, (a, b) in zip(row.axes.split(), band)}}
        tensor = weights.read(keys[layer], hf_index(row, index, sizes))
        array = from_hf(row, tensor, own)
        if row.stacked:
            array, band = array[None], ((layer, layer + 1), *band)
        for block, shard in shards.items():
            _copy_overlap(array, band, shard, block)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, jobs))
    return shards


def bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> Bounds:
    """The block of an array at an index of slices."""
    return tuple(span.indices(size)[:2] for span, size in zip(index or (), shape))


def _bands(row: Parameter, region: Bounds, itemsize: int) -> Iterable[tuple[int, Bounds]]:
    """Each layer of a region in bands of at most `SLICE_BYTES`, without the layers' axis."""
    layers, block = (range(*region[0]), region[1:]) if row.stacked else (range(1), region)
    band = row.axes.split().index(band_axis(row))
    first, last = block[band]
    each = _volume(block) // max(1, last - first) * itemsize
    bands = cut(last - first, max(1, SLICE_BYTES // max(1, each)))
    for layer, (start, stop) in itertools.product(layers, list(bands)):
        yield layer, (*block[:band], (first + start, first + stop), *block[band + 1 :])


def _volume(block: Bounds) -> int:
    return math.prod(b - a for a, b in block)


def _copy_overlap(array: np.ndarray, at: Bounds, shard: np.ndarray, shard_at: Bounds) -> None:
    """Copies into `shard` what `array` has of it; `at` and `shard_at` are where the two are."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(at, shard_at)]
    if all(a < b for a, b in common):
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, at))
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, shard_at))
        shard[target] = array[source]


def load_params(source: Pretrained, model: Model, *, seed: int, dtype: Any) -> Params:
    """Reads a model's parameters onto `model`'s mesh; each process reads its own shards, once.

    Args:
      source: what to read; its adapters, if it has any, are merged into its weights.
      model: what to read it for. Adapters are always new; so is a reward head that `source` does
        not have.
      seed: of what is new.
      dtype: of the parameters, but those that are float32 always; see `parameters.Parameter`.

    Raises:
      UserError: something is missing, damaged or of another shape.
    """
    stored = dataclasses.replace(model, lora=source.lora)
    wanted = flatten(stored.abstract(dtype))
    fresh_head = HEAD.path in wanted and source.spec is None
    if fresh_head:
        del wanted[HEAD.path]
    if LM_HEAD.path in wanted and source.spec:
        raise UserError(f"{source.name}: a reward model, which has no language-model head")
    if isinstance(source.weights, Path):
        leaves = merge_adapters(_load_orbax(source.weights, wanted), source.lora)
    else:
        if isinstance(model.head, LanguageModelHead):  # which opening does not ask for
            check_tensors(source.weights, source.decoder, model.head)
        leaves = {
            path: load_parameter(
                source.weights, row, hf_keys(row, source.decoder), leaf, stored.sizes
            )
            for path, leaf in wanted.items()
            for row in [TABLE[path]]
        }
    if fresh_head:
        leaves[HEAD.path] = random_head(model, seed)
    fresh = [row.path for row in adapter_parameters(model.lora)]
    leaves |= random_leaves(model, seed, fresh) if fresh else {}
    return nest(leaves)


def _load_orbax(directory: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    for path, leaf in wanted.items():
        open_array(directory / "params", path, leaf.shape)  # which names what is wrong
    from orbax.checkpoint import v1 as ocp  # takes long to import, and other forms need none

    tree = {"params": nest(dict(wanted))}
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # a head that is not wanted is not read
    try:
        with context:
            return flatten(ocp.load_checkpointables(str(directory.absolute()), tree)["params"])
    except Exception as error:  # Orbax passes on whatever its storage raises
        raise UserError(
            f"{directory}: incomplete or damaged checkpoint ({cause(error)})"
        ) from error
