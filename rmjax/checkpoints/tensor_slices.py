"""The slices that a conversion copies: bands of a layer's tensor, several of which fit in memory.

Hugging Face's tensor of a layer is cut along its first axis, so that a slice is one range of bytes
in its file. In our stacked array it is a block, cut along the same axis.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from rmjax.checkpoints.hf_mapping import from_hf, hf_index, hf_shape, to_hf
from rmjax.models.parameters import Parameter

SLICE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """`start:stop` of an HF tensor along our axis that comes first in it (heads, mlp, vocab, ...).

    Attributes:
      number: of the slice in its conversion, from 0.
      row: the parameter.
      key: the HF tensor.
      layer: which layer it is of; 0 where the parameter is not stacked.
      start: first index along `band_axis(row)`.
      stop: one after the last.
      sizes: of every axis of the whole model.
      dtype: of the converted tensor.
    """

    number: int
    row: Parameter
    key: str
    layer: int
    start: int
    stop: int
    sizes: Mapping[str, int]
    dtype: np.dtype

    @property
    def _band(self) -> dict[str, slice]:
        return {band_axis(self.row): slice(self.start, self.stop)}

    @property
    def _own_sizes(self) -> dict[str, int]:
        return {**self.sizes, band_axis(self.row): self.stop - self.start}

    @property
    def hf_index(self) -> tuple[slice, ...]:
        """Where it is in the HF tensor."""
        return hf_index(self.row, self._band, self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in HF's axes."""
        return hf_shape(self.row, self._own_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the converted slice."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def offset(self) -> int:
        """Its first byte in the converted HF tensor."""
        return self.hf_index[0].start * math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where it is in our array."""
        layer = (self.layer,) if self.row.stacked else ()
        return (*layer, *(self._band.get(axis, slice(None)) for axis in self.row.axes.split()))

    def from_hf(self, block: np.ndarray) -> np.ndarray:
        """The slice in our axes, C-contiguous, from HF's."""
        return from_hf(self.row, block, self._own_sizes)

    def to_hf(self, block: np.ndarray) -> np.ndarray:
        """The slice in HF's axes, C-contiguous, from ours."""
        return to_hf(self.row, block, self._own_sizes)


def band_axis(row: Parameter) -> str:
    """Our axis that comes first in the parameter's HF tensor."""
    return row.hf_axes.replace("(", "").replace(")", "").split()[0]


def cut(size: int, step: int) -> Iterator[tuple[int, int]]:
    """Start and stop of bands of at most `step` that make up an axis of `size`."""
    for start in range(0, size, step):
        yield start, min(start + step, size)
