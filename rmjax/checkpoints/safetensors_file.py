"""One safetensors file: where each tensor's bytes are, read and written by ranges.

The library `safetensors` only checks a file here. It does not read the tensors: it maps the file
into memory, and every page that it touches counts as this process's memory until the kernel takes
it back, so memory would not be bounded. It does not write them either: it needs all tensors of a
file in memory. The format, from its documentation: 8 bytes of header length, a JSON header padded
to 8 bytes, the tensors' bytes one after the other in C order.
"""

import dataclasses
import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 through it)
import numpy as np
from safetensors import SafetensorError, safe_open

from rmjax.errors import UserError
from rmjax.runtime.json_object import parse_object

# The dtypes that a model may have, by numpy's name, and safetensors' name for each.
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NUMPY = {theirs: ours for ours, theirs in DTYPES.items()}
# Storage reads pages of 4 KiB: where less than that lies between the wanted parts of two rows,
# reading whole rows moves no more bytes and takes fewer calls.
_PAGE = 4096
_BUFFER = 16 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype by safetensors' name, its shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """A file open for reading; any number of threads may read at once.

    Attributes:
      path: where it is.
      entries: every tensor by its key.
    """

    def __init__(self, path: Path):
        """Raises a `UserError` if the file is truncated or no safetensors file."""
        self.path = path
        try:
            with safe_open(path, framework="np"):
                pass  # it checks lengths, overlaps and gaps
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error})") from error
        start = 8 + int.from_bytes(self._file.read(8), "little")
        header = parse_object(self._file.read(start - 8), f"{path}: its header")
        header.pop("__metadata__", None)
        self.entries = {
            key: Entry(fields["dtype"], tuple(fields["shape"]), start + fields["data_offsets"][0])
            for key, fields in header.items()
        }

    def dtype(self, key: str) -> np.dtype:
        """The dtype of a tensor; a `UserError` if a model may not have it."""
        name = self.entries[key].dtype
        if name not in _NUMPY:
            raise UserError(f"{self.path}: tensor {key!r} is {name}; supported: {list(_NUMPY)}")
        return np.dtype(_NUMPY[name])

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A tensor, or the block of it that `index` cuts out (one slice an axis, from the left).

        Only the block's bytes are read, and what lies between them where it is less than a page.
        """
        entry, dtype = self.entries[key], self.dtype(key)
        index = [*index, *[slice(None)] * (len(entry.shape) - len(index))]
        bounds = [span.indices(size)[:2] for span, size in zip(index, entry.shape)]
        out = np.empty([max(0, stop - start) for start, stop in bounds], dtype)
        if not out.size:
            return out
        if out.shape[1:] == entry.shape[1:]:  # whole rows, which lie together
            row = math.prod(entry.shape[1:]) * dtype.itemsize
            self._fill(out, entry.offset + (bounds[0][0] * row if bounds else 0))
            return out
        if out.ndim != 2:
            raise ValueError(f"tensor {key!r} of shape {entry.shape} cannot be cut by {index}")
        self._fill_columns(out, entry, bounds)
        return out

    def _fill_columns(
        self, out: np.ndarray, entry: Entry, bounds: Sequence[tuple[int, int]]
    ) -> None:
        (first, last), (left, right) = bounds
        row, size = entry.shape[1] * out.itemsize, out.itemsize
        if (entry.shape[1] - out.shape[1]) * size >= _PAGE:
            for number in range(first, last):
                self._fill(out[number - first], entry.offset + number * row + left * size)
            return
        step = max(1, _BUFFER // row)
        for number in range(first, last, step):
            rows = np.empty((min(step, last - number), entry.shape[1]), out.dtype)
            self._fill(rows, entry.offset + number * row)
            out[number - first : number - first + len(rows)] = rows[:, left:right]

    def _fill(self, out: np.ndarray, offset: int) -> None:
        _fill(self._file.fileno(), out, offset, self.path)


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """A file to be written: its header's bytes, and where each tensor will start.

    Attributes:
      header: the first bytes of the file.
      offsets: first byte of each tensor by key.
      size: bytes of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    size: int


def file_layout(tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]]) -> FileLayout:
    """Lays out a file of tensors, each given by key, shape and dtype, in that order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    for key, shape, dtype in tensors:
        offsets[key] = offset
        offset += math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": DTYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [offsets[key], offset],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    absolute = {key: start + offset for key, offset in offsets.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, absolute, start + offset)


def create_file(path: Path, layout: FileLayout) -> None:
    """Makes a file of its final length; without a header nothing takes it for a model's."""
    with open(path, "wb") as file:
        file.truncate(layout.size)


def write_header(path: Path, layout: FileLayout) -> None:
    """Writes the header, after all tensors, and reads it back."""
    header = np.frombuffer(layout.header, np.uint8)
    write_range(path, 0, header)
    if not np.array_equal(read_range(path, 0, header.shape, header.dtype), header):
        raise UserError(f"{path}: its header, read back, is not what was written")


def write_range(path: Path, offset: int, array: np.ndarray) -> None:
    """Writes an array's bytes at `offset`, and returns when they are on the disk."""
    with open(path, "r+b", buffering=0) as file:
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        while view:
            count = os.pwrite(file.fileno(), view, offset)
            view, offset = view[count:], offset + count
        os.fsync(file.fileno())


def read_range(path: Path, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Reads an array back from the disk, not from the kernel's page cache."""
    out = np.empty(shape, dtype)
    with open(path, "rb", buffering=0) as file:
        forget(file.fileno(), offset, out.nbytes)
        _fill(file.fileno(), out, offset, path)
    return out


def _fill(file: int, out: np.ndarray, offset: int, path: Path) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8).data)
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise UserError(f"{path}: ends before byte {offset}, where a tensor's bytes should be")
        view, offset = view[count:], offset + count


def forget(file: int, offset: int = 0, length: int = 0) -> None:
    """Drops what is on the disk already from the kernel's page cache of a file."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)
