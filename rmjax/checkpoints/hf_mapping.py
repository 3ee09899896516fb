"""Which Hugging Face tensor holds which parameter, and the one as the other."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange

from rmjax.checkpoints.contiguous import contiguous
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.parameters import Parameter


def hf_keys(row: Parameter, config: DecoderConfig) -> list[str]:
    """The HF keys of a parameter, in the order of the layers."""
    key = config.row.hf_keys.get(row.path, row.hf_key)
    return [key.format(n) for n in range(config.num_hidden_layers if row.stacked else 1)]


def hf_shape(row: Parameter, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter's HF tensor (of one layer, where it is stacked)."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in hf_groups(row))


def hf_index(
    row: Parameter, index: Mapping[str, slice], sizes: Mapping[str, int]
) -> tuple[slice, ...]:
    """The block of a parameter's HF tensor that holds a block of ours.

    Args:
      row: the parameter.
      index: of our block, by axis; an axis that is not there is whole.
      sizes: of every axis.

    Raises:
      ValueError: axes that share one of HF's are cut other than along the first of them.
    """
    theirs = []
    for first, *rest in hf_groups(row):
        unit = math.prod(sizes[axis] for axis in rest)
        for axis in rest:
            if index.get(axis, slice(None)).indices(sizes[axis]) != (0, sizes[axis], 1):
                raise ValueError(f"{row.path}: {axis!r} is inside of an axis of {row.hf_key}")
        start, stop, _ = index.get(first, slice(None)).indices(sizes[first])
        theirs.append(slice(start * unit, stop * unit))
    return tuple(theirs)


def our_index(row: Parameter, index: Sequence[slice], sizes: Mapping[str, int]) -> dict[str, slice]:
    """The block of ours, by axis, that a block of a parameter's HF tensor holds.

    The inverse of `hf_index`.

    Args:
      row: the parameter.
      index: of the block, one slice an axis from the left; an axis that is not there is whole.
      sizes: of every axis.

    Raises:
      ValueError: an axis of HF's is cut inside of what one index of ours stands for.
    """
    ours = {}
    for (first, *rest), span in zip(hf_groups(row), index):
        unit = math.prod(sizes[axis] for axis in rest)
        start, stop, _ = span.indices(sizes[first] * unit)
        if start % unit or stop % unit:
            raise ValueError(f"{row.hf_key}: {start}:{stop} is not a whole number of {first!r}")
        ours[first] = slice(start // unit, stop // unit)
    return ours


def hf_groups(row: Parameter) -> list[list[str]]:
    """Our axes that make up each axis of the HF tensor."""
    axes = re.findall(r"\(([^)]*)\)|(\S+)", row.hf_axes)
    return [(group or single).split() for group, single in axes]


def from_hf(row: Parameter, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """An HF tensor in our axes, C-contiguous."""
    own = {axis: sizes[axis] for axis in row.axes.split()}
    return contiguous(rearrange(tensor, f"{row.hf_axes} -> {row.axes}", **own))


def to_hf(row: Parameter, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Our array (one layer's, where it is stacked) in the axes of its HF tensor, C-contiguous."""
    own = {axis: sizes[axis] for axis in row.axes.split()}
    return contiguous(rearrange(array, f"{row.axes} -> {row.hf_axes}", **own))
