"""From Hugging Face's tensors to an Orbax model: how each slice is read and written."""

from pathlib import Path

import numpy as np
import tensorstore as ts

from rmjax.checkpoints.hf_mapping import hf_keys
from rmjax.checkpoints.hf_weights import Weights, common_dtype
from rmjax.checkpoints.orbax_arrays import (
    array_cuts,
    create_array,
    forget_file,
    open_array,
    read_block,
    write_metadata,
)
from rmjax.checkpoints.pretrained import WEIGHTS
from rmjax.checkpoints.tensor_slices import TensorSlice, band_axis, cut
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import Head, model_parameters, model_sizes
from rmjax.models.parameters import Parameter


class ToOrbax:
    """A conversion to Orbax; a slice is a file of its array.

    Attributes:
      slices: in the order of the layers, which is about that of the source's files.
    """

    def __init__(self, weights: Weights, decoder: DecoderConfig, head: Head):
        """Plans the slices."""
        self._weights = weights
        self._sizes = model_sizes(decoder, head)
        self._rows = model_parameters(decoder, head)
        self._keys = {row.path: hf_keys(row, decoder) for row in self._rows}
        self._dtypes = {row.path: self._dtype(row) for row in self._rows}
        self._open: dict[str, ts.TensorStore] = {}
        self.slices: list[TensorSlice] = []
        for layer in range(decoder.num_hidden_layers):
            for row in self._rows:
                if layer == 0 or row.stacked:
                    self._plan(row, layer)

    def _dtype(self, row: Parameter) -> np.dtype:
        """The dtype of a parameter; layers of unequal precision share the widest."""
        return common_dtype(self._weights, self._keys[row.path])

    def _shape(self, row: Parameter) -> list[int]:
        return [self._sizes[axis] for axis in row.all_axes]

    def _cuts(self, row: Parameter) -> tuple[list[int], list[int]]:
        return array_cuts(row, self._sizes, self._dtypes[row.path].itemsize)

    def _plan(self, row: Parameter, layer: int) -> None:
        step = self._cuts(row)[0][row.all_axes.index(band_axis(row))]
        key, dtype = self._keys[row.path][layer], self._dtypes[row.path]
        for start, stop in cut(self._sizes[band_axis(row)], step):
            number = len(self.slices)
            self.slices.append(
                TensorSlice(number, row, key, layer, start, stop, self._sizes, dtype)
            )

    def prepare(self, files: Path, model: Path) -> None:
        """Creates the arrays, without their files."""
        for row in self._rows:
            create_array(
                model / WEIGHTS / "params",
                row.path,
                self._shape(row),
                self._dtypes[row.path],
                *self._cuts(row),
            )

    def read(self, part: TensorSlice) -> np.ndarray:
        """A slice of the source, in HF's axes and the converted dtype."""
        block = self._weights.read(part.key, part.hf_index)
        return block.astype(part.dtype, copy=False)

    def write(self, model: Path, part: TensorSlice, block: np.ndarray) -> None:
        """Writes the file that the slice is."""
        self._array(model, part)[part.index].write(part.from_hf(block)).result()

    def read_back(self, model: Path, part: TensorSlice) -> np.ndarray:
        """The slice as it is on the disk, in HF's axes."""
        params, path, array = self._params(model), part.row.path, self._array(model, part)
        file_shape = self._cuts(part.row)[0]
        starts = [axis if isinstance(axis, int) else axis.start or 0 for axis in part.index]
        forget_file(params, path, [start // size for start, size in zip(starts, file_shape)])
        return part.to_hf(read_block(array, params, path, part.index))

    def complete(self, model: Path) -> None:
        """Writes what makes the arrays a checkpoint."""
        write_metadata(model / WEIGHTS, {row.path: self._shape(row) for row in self._rows})

    def _params(self, model: Path) -> Path:
        return model / WEIGHTS / "params"

    def _array(self, model: Path, part: TensorSlice) -> ts.TensorStore:
        path = part.row.path
        if path not in self._open:
            self._open[path] = open_array(self._params(model), path, writing=True)
        return self._open[path]
