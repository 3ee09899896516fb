"""Arrays of an Orbax checkpoint, opened one by one and read and written block by block.

Orbax saves and restores whole trees. Conversion needs a block of one layer at a time, so that
memory is bounded whatever the model's size. So these functions read and write Orbax's own format
on disk (zarr v3 arrays and `_METADATA`) through TensorStore, which Orbax uses itself. A test checks
that Orbax restores what is written here.

How an array is cut, and why:

- A *file* holds a band of one layer of at most 64 MiB, cut along the axis that leads the tensor in
  Hugging Face's format. One range of bytes there is one file here, so either is written from the
  other without holding more. A 70B model is about 2,600 files, a 405B one about 14,700.
- A file consists of *chunks* of at most 1 MiB (zarr's sharding codec), nearly square, because a
  mesh cuts along both sides. A reader fetches only the chunks that it needs from a file, so a host
  reads little beyond its own shards on any mesh.
- Axes are halved, so that chunks end where shards do, whose number is a power of two.
- Chunks carry a CRC32C, which is checked when they are read. They are not compressed: zstd makes
  bfloat16 weights a fifth smaller and takes three times the processor's time.
"""

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from rmjax.checkpoints.hf_mapping import hf_groups
from rmjax.checkpoints.safetensors_file import forget
from rmjax.checkpoints.tensor_slices import band_axis
from rmjax.errors import UserError, shortened
from rmjax.models.parameters import Parameter
from rmjax.runtime.files import read_json

FILE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_NO_CHECKSUMS = (
    "this version of Orbax codes chunks in another way than rmjax knows: checkpoints get no "
    "checksum of their numbers, and a flipped bit is not noticed; install orbax-checkpoint 0.12.8"
)
_DICT_KEY = 2  # Orbax's code for "a key of a dict" in its tree metadata


def array_cuts(
    row: Parameter, sizes: Mapping[str, int], itemsize: int
) -> tuple[list[int], list[int]]:
    """The shapes of a parameter's files and of the chunks in them; see above.

    Args:
      row: the parameter.
      sizes: of every axis.
      itemsize: bytes of a number.
    """
    # How many indices along an axis of HF's tensor one index along ours stands for. An axis that
    # is inside of one there (head_dim) is never cut.
    units = {first: math.prod(sizes[axis] for axis in rest) for first, *rest in hf_groups(row)}
    file = {axis: 1 if axis == "layers" else sizes[axis] for axis in row.all_axes}
    band = band_axis(row)
    while math.prod(file.values()) * itemsize > FILE_BYTES and file[band] > 1:
        file[band] = -(-file[band] // 2)
    chunk, halvings = dict(file), dict.fromkeys(file, 0)
    while math.prod(chunk.values()) * itemsize > CHUNK_BYTES:
        longest = max(units, key=lambda axis: chunk[axis] * units[axis] * (chunk[axis] > 1))
        if chunk[longest] == 1:
            break
        chunk[longest] = -(-chunk[longest] // 2)
        halvings[longest] += 1
    # A file has a whole number of chunks, where need be beyond the array's end.
    return [chunk[axis] << halvings[axis] for axis in chunk], list(chunk.values())


def create_array(
    params: Path,
    path: str,
    shape: Sequence[int],
    dtype: np.dtype,
    file: Sequence[int],
    chunk: Sequence[int],
) -> ts.TensorStore:
    """Creates the array of parameter `path` ("layers/q") under `params`."""
    number: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum: dict[str, Any] = {"name": "crc32c"}
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": [number, checksum],
        "index_codecs": [number, checksum],
    }
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{params / _name(path)}/"},
            "metadata": {
                "shape": list(shape),
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(file)}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
            # Chunks of zeros too, so that a chunk that is not there is known to be lost.
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()


def with_checksums() -> None:
    """Has Orbax write a CRC32C behind every chunk, which TensorStore checks when it is read.

    By itself it writes none behind the numbers, only behind its own directories: a flipped bit of a
    weight is read as another weight. Orbax has no option for it, so the function in it that says
    how chunks are coded is wrapped. An Orbax that has no such function saves as it does by itself,
    and a warning says so.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils as orbax

    build: Any = getattr(orbax, "_build_zarr3_metadata", None)
    if build is None:
        warnings.warn(_NO_CHECKSUMS, stacklevel=2)
        return
    if build.__module__ == __name__:
        return

    def with_checksum(*args: Any, **options: Any) -> Any:
        metadata = build(*args, **options)
        try:
            metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
        except (KeyError, IndexError, TypeError):
            warnings.warn(_NO_CHECKSUMS, stacklevel=2)
        return metadata

    orbax._build_zarr3_metadata = with_checksum


def written_by_orbax(params: Path) -> bool:
    """Whether Orbax saved these arrays (a run's), and not `create_array` (a converted model's)."""
    return (params / "manifest.ocdbt").exists()


def open_array(
    params: Path,
    path: str,
    shape: Sequence[int] | None = None,
    *,
    writing: bool = False,
    context: ts.Context | None = None,
) -> ts.TensorStore:
    """Opens the array of a parameter, whether Orbax or `create_array` wrote it.

    Args:
      params: the directory of the arrays.
      path: of the parameter.
      shape: what the model's config calls for; not checked if not given.
      writing: open it for writing too, and do not check that all of its files are there.
      context: of TensorStore; with a cache, chunks that were read are kept in it.

    Raises:
      UserError: it is not there, damaged, or of another shape.
    """
    if written_by_orbax(params):
        base = {"driver": "file", "path": f"{params}/"}  # as a URL it would have to be absolute
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{_name(path)}/"}
    else:
        kvstore = {"driver": "file", "path": f"{params / _name(path)}/"}
        # TensorStore's parser ends the process where JSON is nested too deeply; Python's does not.
        if (described := params / _name(path) / "zarr.json").exists():
            with _damage(params, path, "missing or damaged"):
                read_json(described)
    spec = {"driver": "zarr3", "kvstore": kvstore, "store_data_equal_to_fill_value": True}
    with _damage(params, path, "missing or damaged"):
        recheck = None if context is None else False  # cached chunks are not read again
        array = ts.open(
            spec, read=True, write=writing, context=context, recheck_cached_data=recheck
        ).result()
    if kvstore["driver"] == "file" and not writing:
        # zarr reads a missing file as zeros, so a lost file would be a wrong model: count them.
        file_shape: Any = array.chunk_layout.write_chunk.shape
        expected = math.prod(-(-size // file) for size, file in zip(array.shape, file_shape))
        count = sum(file.is_file() for file in (params / _name(path) / "c").rglob("*"))
        if count != expected:
            raise UserError(
                f"{params}: parameter {path!r} has {count} of its {expected} files; convert the "
                "model again"
            )
    if shape is not None and array.shape != tuple(shape):
        raise UserError(
            f"{params}: parameter {path!r} has shape {tuple(array.shape)}, but config.json calls "
            f"for {tuple(shape)}"
        )
    return array


def read_array(params: Path, path: str, index: Any = ...) -> np.ndarray:
    """Reads a parameter, or the slice `index` of it.

    Raises:
      UserError: it is not there, or damaged.
    """
    return read_block(open_array(params, path), params, path, index)


def read_block(array: ts.TensorStore, params: Path, path: str, index: Any = ...) -> np.ndarray:
    """Reads the block `index` of an open array, which is parameter `path` under `params`.

    Raises:
      UserError: it is damaged.
    """
    with _damage(params, path, "damaged"):
        return array[index].read().result()


@contextlib.contextmanager
def _damage(params: Path, path: str, what: str) -> Any:
    try:
        yield
    except (ValueError, UserError) as error:
        raise UserError(f"{params}: parameter {path!r} is {what} ({str(error)[:200]})") from error


def forget_file(params: Path, path: str, grid_index: Sequence[int]) -> None:
    """Drops an array's file from the kernel's page cache, so that the disk is read next."""
    name = (params / _name(path) / "c").joinpath(*map(str, grid_index))
    with contextlib.suppress(OSError), open(name, "rb") as file:
        forget(file.fileno())


def cause(error: BaseException) -> str:
    """TensorStore's message, which names the file, without what Orbax wraps around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error).split(" [tensorstore_spec")[0][:400]


def array_paths(params: Path) -> set[str]:
    """The parameters that the checkpoint's metadata name.

    Raises:
      UserError: there is no complete checkpoint.
    """
    try:
        tree = read_json(params / "_METADATA")["tree_metadata"]
        return {"/".join(k["key"] for k in leaf["key_metadata"]) for leaf in tree.values()}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{params}: not a complete Orbax checkpoint ({shortened(str(error), 300)})"
        ) from error


def write_metadata(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes what makes `checkpoint/params` an Orbax checkpoint, after all of its arrays."""
    now = time.time_ns()
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (checkpoint / "params" / "_METADATA").write_text(json.dumps(metadata))
    root = {
        "item_handlers": {"params": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(root))


def _name(path: str) -> str:
    return path.replace("/", ".")
