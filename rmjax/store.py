"""Arrays of an Orbax checkpoint, opened one by one and written slice by slice.

Orbax saves and restores whole trees. Conversion needs a layer's slice of a stacked array at a
time, so that memory is bounded by a few tensors and not by the model: these functions read
and write Orbax's own on-disk format (zarr v3 arrays and `_METADATA`) through TensorStore, which
Orbax itself uses. A test holds them to Orbax: it must restore what is written here.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from rmjax.errors import UserError

_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_DICT_KEY = 2  # Orbax's code for "a key of a dict" in its tree metadata


def create_array(
    params: Path, path: str, shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int]
) -> ts.TensorStore:
    """Creates the array of parameter `path` ("layers/q") under `params`."""
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{params / _name(path)}/"},
            "metadata": {
                "shape": list(shape),
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "zstd", "configuration": {"level": 1}},
                ],
            },
            # Chunks of zeros too: a chunk that is not there is then known to be lost.
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()


def open_array(params: Path, path: str) -> ts.TensorStore:
    """Opens the array of a parameter, whether Orbax or `create_array` wrote it.

    Raises:
      UserError: it is not there, or damaged.
    """
    if (params / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{params}/"}  # as a URL it would have to be absolute
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{_name(path)}/"}
    else:
        kvstore = {"driver": "file", "path": f"{params / _name(path)}/"}
    try:
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    except ValueError as error:
        raise UserError(
            f"{params}: parameter {path!r} is missing or damaged ({str(error)[:200]})"
        ) from error
    if kvstore["driver"] == "file":
        # zarr reads a chunk that is not there as zeros: count, or a lost file is a wrong model.
        chunks: Any = array.chunk_layout.read_chunk.shape
        expected = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, chunks))
        found = sum(file.is_file() for file in (params / _name(path) / "c").rglob("*"))
        if found != expected:
            raise UserError(
                f"{params}: parameter {path!r} has {found} of its {expected} chunks; convert the "
                "model again"
            )
    return array


def read_array(params: Path, path: str, index: Any = ...) -> np.ndarray:
    """Reads a parameter, or the slice `index` of it.

    Raises:
      UserError: it is not there, or damaged.
    """
    try:
        return open_array(params, path)[index].read().result()
    except ValueError as error:
        raise UserError(f"{params}: parameter {path!r} is damaged ({str(error)[:200]})") from error


def cause(error: BaseException) -> str:
    """What TensorStore said, out of all that Orbax wraps around it; it names the file."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error).split(" [tensorstore_spec")[0][:400]


def array_paths(params: Path) -> set[str]:
    """The parameters that the checkpoint's metadata name.

    Raises:
      UserError: there is no complete checkpoint.
    """
    try:
        tree = json.loads((params / "_METADATA").read_text())["tree_metadata"]
        return {"/".join(k["key"] for k in leaf["key_metadata"]) for leaf in tree.values()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{params}: not a complete Orbax checkpoint ({error})") from error


def write_metadata(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes what makes `checkpoint/params` an Orbax checkpoint; call it when all arrays are."""
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
