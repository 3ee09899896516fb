"""From an Orbax model or a run to Hugging Face's files: how each slice is read and written.

A run's adapters are either merged into its weights or exported alone, with a reward model's head,
in PEFT's format.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.orbax_arrays import open_array, read_block
from rmjax.checkpoints.safetensors_file import (
    FileLayout,
    create_file,
    file_layout,
    read_range,
    write_header,
    write_range,
)
from rmjax.checkpoints.tensor_slices import SLICE_BYTES, TensorSlice, band_axis, cut
from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.models.heads import Head, RewardHead, model_parameters, model_sizes
from rmjax.models.lora import merge_block
from rmjax.models.parameters import (
    ADAPTERS,
    HEAD,
    Parameter,
    peft_parameters,
)

# Where the source's chunks are large, so is a slice: a chunk that two share is read twice.
_LARGEST_SLICE = 512 << 20


@dataclasses.dataclass(frozen=True)
class _Tensor:
    key: str
    row: Parameter
    layer: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ToHuggingFace:
    """An export; a slice is a range of bytes of a safetensors file.

    Attributes:
      slices: in the order of the files.
      keys: of the tensors.
      dtype: of most of the weights.
      files: how many safetensors files there will be.
    """

    def __init__(
        self,
        params: Path,
        decoder: DecoderConfig,
        head: Head,
        dtype: str | None,
        limit: int,
        lora: LoraConfig = NO_LORA,
        adapter: bool = False,
        fold: Float32[np.ndarray, "A"] | None = None,
    ):
        """Plans files and slices.

        Args:
          params: the directory of the arrays.
          decoder: the architecture.
          head: the model's.
          dtype: of the weights; None for the stored one.
          limit: most bytes of a file.
          lora: the adapters to merge into the weights.
          adapter: export them and a reward head alone instead, by PEFT's names.
          fold: weights of a reward head's outputs, whose sum is then the only one, in float32.

        Raises:
          UserError: a parameter is missing, damaged or of another shape than the config calls for.
        """
        self._params, self._llama = params, decoder
        self._stored = model_sizes(decoder, head, lora)
        self._fold = fold
        self._sizes = self._stored if fold is None else {**self._stored, "attribute": 1}
        self._arrays: dict[str, ts.TensorStore] = {}
        self._lora = NO_LORA if adapter else lora  # what is to be merged
        rows = model_parameters(decoder, head)
        if adapter:
            rows = peft_parameters(lora, reward=isinstance(head, RewardHead))
        tensors: list[_Tensor] = []
        for row in rows:
            tensors += self._tensors(row, dtype)
            if self._lora.adapts(row.path):
                for adapter_row in ADAPTERS[row.path]:
                    self._open(adapter_row)
        self.dtype = max(tensors, key=lambda tensor: tensor.nbytes).dtype
        self.keys = [tensor.key for tensor in tensors]
        shards = _shards(tensors, limit)
        self.files = len(shards)
        self._total = sum(tensor.nbytes for tensor in tensors)
        self._layouts: dict[str, FileLayout] = {}
        self._file_of: dict[str, str] = {}
        self.slices: list[TensorSlice] = []
        for number, shard in enumerate(shards, start=1):
            stem = "adapter_model" if adapter else "model"
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            name = name if len(shards) > 1 else f"{stem}.safetensors"
            self._layouts[name] = file_layout([(t.key, t.shape, t.dtype) for t in shard])
            for tensor in shard:
                self._file_of[tensor.key] = name
                self._plan(tensor)

    def _open(self, row: Parameter) -> ts.TensorStore:
        shape = [self._stored[axis] for axis in row.all_axes]
        array = self._arrays[row.path] = open_array(self._params, row.path, shape)
        return array

    def _tensors(self, row: Parameter, dtype: str | None) -> list[_Tensor]:
        stored = self._open(row).dtype.numpy_dtype
        wanted = stored if dtype is None or row == HEAD else np.dtype(dtype)
        if row == HEAD and self._fold is not None:
            wanted = np.dtype(np.float32)
        return [
            _Tensor(key, row, layer, hf_shape(row, self._sizes), wanted)
            for layer, key in enumerate(hf_keys(row, self._llama))
        ]

    def _plan(self, tensor: _Tensor) -> None:
        """Cuts a tensor into slices, along the source's chunks where possible."""
        row, array = tensor.row, self._arrays[tensor.row.path]
        chunk: Any = array.chunk_layout.read_chunk.shape
        aligned = chunk[row.all_axes.index(band_axis(row))]
        size = self._sizes[band_axis(row)]
        itemsize = max(tensor.dtype.itemsize, array.dtype.numpy_dtype.itemsize)
        if self._lora.adapts(row.path):  # merged in float32
            itemsize = max(itemsize, 4)
        each = math.prod(tensor.shape) // size * itemsize
        step = max(aligned, SLICE_BYTES // each // aligned * aligned)
        for start, stop in cut(size, min(step, max(1, _LARGEST_SLICE // each))):
            number = len(self.slices)
            self.slices.append(
                TensorSlice(
                    number, row, tensor.key, tensor.layer, start, stop, self._sizes, tensor.dtype
                )
            )

    def prepare(self, files: Path, model: Path) -> None:
        """Creates the files, empty and without headers, and their index."""
        for name, layout in self._layouts.items():
            create_file(model / name, layout)
        if self.files > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            (files / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def read(self, part: TensorSlice) -> np.ndarray:
        """A slice of the source, in HF's axes and the converted dtype."""
        if part.row == HEAD and self._fold is not None:
            head = self._block(HEAD, {}).astype(np.float64)
            return part.to_hf(head @ self._fold[:, None]).astype(part.dtype)
        index = dict(zip(part.row.all_axes, part.index))
        block = self._block(part.row, index)
        if self._lora.adapts(part.row.path):
            a, b = (self._block(row, index) for row in ADAPTERS[part.row.path])
            block = merge_block(block, a, b, self._lora.scale)
        return part.to_hf(block).astype(part.dtype, copy=False)

    def _block(self, row: Parameter, index: Mapping[str, int | slice]) -> np.ndarray:
        """A parameter at `index` by axis; axes that are not there are whole."""
        by_axis = tuple(index.get(axis, slice(None)) for axis in row.all_axes)
        return read_block(self._arrays[row.path], self._params, row.path, by_axis)

    def write(self, model: Path, part: TensorSlice, block: np.ndarray) -> None:
        """Writes a slice at its offset in its file."""
        write_range(model / self._file_of[part.key], self._offset(part), block)

    def read_back(self, model: Path, part: TensorSlice) -> np.ndarray:
        """The slice as it is on the disk."""
        name = self._file_of[part.key]
        return read_range(model / name, self._offset(part), part.shape, part.dtype)

    def complete(self, model: Path) -> None:
        """Writes the headers, without which nothing takes the files for a model's."""
        for name, layout in self._layouts.items():
            write_header(model / name, layout)

    def _offset(self, part: TensorSlice) -> int:
        return self._layouts[self._file_of[part.key]].offsets[part.key] + part.offset


def _shards(tensors: list[_Tensor], limit: int) -> list[list[_Tensor]]:
    """The tensors of each file, in order; a file exceeds the limit only if one tensor does."""
    shards: list[list[_Tensor]] = [[]]
    total = 0
    for tensor in tensors:
        if shards[-1] and total + tensor.nbytes > limit:
            shards.append([])
            total = 0
        shards[-1].append(tensor)
        total += tensor.nbytes
    return shards
