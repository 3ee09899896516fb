"""An Orbax model's or a run's arrays under Hugging Face's names, read block by block."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape, our_index, to_hf
from rmjax.checkpoints.hf_weights import Weights
from rmjax.checkpoints.orbax_arrays import open_array, read_block, written_by_orbax
from rmjax.checkpoints.pretrained import Pretrained
from rmjax.checkpoints.tensor_slices import SLICE_BYTES
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import Head, model_parameters, model_sizes
from rmjax.models.parameters import Parameter

# The cache for chunks of a run, in sizes of its largest tensor in float32. A run's arrays are cut
# as its mesh was, so a slice of a tensor needs a part of every chunk: without a cache each slice
# would read the whole tensor again. It has some room for the tensor that follows.
_CACHED_TENSORS = 1.25


def named_weights(source: Pretrained) -> Weights:
    """The tensors of a model by their Hugging Face names, whatever its form.

    Raises:
      UserError: an array is missing, damaged or of another shape than the config calls for.
    """
    if not isinstance(source.weights, Path):
        return source.weights
    return OrbaxWeights(source.weights, source.decoder, source.head)


class OrbaxWeights:
    """The arrays of an Orbax checkpoint as `Weights`; any number of threads may read."""

    def __init__(self, checkpoint: Path, decoder: DecoderConfig, head: Head):
        """Opens the arrays; raises a `UserError` unless they are those of the config."""
        self.where, self._params = checkpoint, checkpoint / "params"
        self._sizes = model_sizes(decoder, head)
        self._rows: dict[str, tuple[Parameter, int]] = {}
        self._arrays: dict[str, ts.TensorStore] = {}
        rows = list(model_parameters(decoder, head))
        largest = 4 * max(math.prod(hf_shape(row, self._sizes)) for row in rows)
        from_run = written_by_orbax(self._params)
        cached = int(_CACHED_TENSORS * max(largest, SLICE_BYTES)) if from_run else 0
        context = ts.Context({"cache_pool": {"total_bytes_limit": cached}})
        for row in rows:
            shape = [self._sizes[axis] for axis in row.all_axes]
            self._arrays[row.path] = open_array(self._params, row.path, shape, context=context)
            self._rows |= {key: (row, layer) for layer, key in enumerate(hf_keys(row, decoder))}

    def keys(self) -> set[str]:
        return set(self._rows)

    def shape(self, key: str) -> tuple[int, ...]:
        return hf_shape(self._rows[key][0], self._sizes)

    def dtype(self, key: str) -> np.dtype:
        return self._arrays[self._rows[key][0].path].dtype.numpy_dtype

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        row, layer = self._rows[key]
        ours = our_index(row, index, self._sizes)
        within = tuple(ours.get(axis, slice(None)) for axis in row.axes.split())
        within = (layer, *within) if row.stacked else within
        block = read_block(self._arrays[row.path], self._params, row.path, within)
        own = {axis: part.stop - part.start for axis, part in ours.items()}
        return to_hf(row, block, {**self._sizes, **own})

    def files(self) -> list[Path]:
        return [file for file in self.where.rglob("*") if file.is_file()]
