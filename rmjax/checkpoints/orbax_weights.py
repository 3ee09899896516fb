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
from rmjax.checkpoints.tensor_slices import SLICE_BYTES, contiguous
from rmjax.errors import UserError
from rmjax.models.config import LlamaConfig
from rmjax.models.heads import RewardHead, model_parameters, model_sizes
from rmjax.models.parameters import Parameter

# Of a run, what was read is kept until so many times its largest tensor's bytes, in float32, are.
# A run is cut as its mesh was, and a band of a tensor has a part of every chunk of it: otherwise
# each band would read the whole tensor. More than once, for the tensor that follows.
_KEPT = 1.25


def named_weights(source: Pretrained) -> Weights:
    """The tensors of a model by their Hugging Face names, whatever its form.

    Raises:
      UserError: an array is missing, damaged or of another shape than the config calls for.
    """
    if not isinstance(source.weights, Path):
        return source.weights
    assert source.spec is not None  # nothing of Orbax is opened without
    return OrbaxWeights(source.weights, source.llama, len(source.spec.attributes))


class OrbaxWeights:
    """The arrays of an Orbax checkpoint that has `params`; any number of threads may read."""

    def __init__(self, checkpoint: Path, llama: LlamaConfig, attributes: int):
        """Opens the arrays; raises a `UserError` unless they are those of the config."""
        self.where, self._params = checkpoint, checkpoint / "params"
        self._sizes = model_sizes(llama, RewardHead(attributes))
        self._rows: dict[str, tuple[Parameter, int]] = {}
        self._arrays: dict[str, ts.TensorStore] = {}
        rows = list(model_parameters(llama, RewardHead(attributes)))
        largest = 4 * max(math.prod(hf_shape(row, self._sizes)) for row in rows)
        kept = int(_KEPT * max(largest, SLICE_BYTES)) if written_by_orbax(self._params) else 0
        context = ts.Context({"cache_pool": {"total_bytes_limit": kept}})
        for row in rows:
            array = self._arrays[row.path] = open_array(self._params, row.path, context=context)
            shape = tuple(self._sizes[axis] for axis in row.all_axes)
            if tuple(array.shape) != shape:
                raise UserError(
                    f"{self._params}: parameter {row.path!r} has shape {tuple(array.shape)}, but "
                    f"config.json calls for {shape}"
                )
            self._rows |= {key: (row, layer) for layer, key in enumerate(hf_keys(row, llama))}

    def keys(self) -> set[str]:
        return set(self._rows)

    def shape(self, key: str) -> tuple[int, ...]:
        return hf_shape(self._rows[key][0], self._sizes)

    def dtype(self, key: str) -> np.dtype:
        return self._arrays[self._rows[key][0].path].dtype.numpy_dtype

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        row, layer = self._rows[key]
        ours = our_index(row, index, self._sizes)
        place = tuple(ours.get(axis, slice(None)) for axis in row.axes.split())
        place = (layer, *place) if row.stacked else place
        block = read_block(self._arrays[row.path], self._params, row.path, place)
        own = {axis: part.stop - part.start for axis, part in ours.items()}
        return contiguous(to_hf(row, block, {**self._sizes, **own}))

    def files(self) -> list[Path]:
        return [file for file in self.where.rglob("*") if file.is_file()]
