"""Tensors in Hugging Face's naming, read block by block, and how they map to our arrays.

Nothing here runs code from a file: PyTorch's pickled `.bin` files are refused.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.safetensors_file import SafetensorsFile
from rmjax.errors import UserError
from rmjax.models.config import LlamaConfig
from rmjax.models.heads import RewardHead, model_parameters, model_sizes

# Tensors that a Llama checkpoint may carry and a reward model has no use for.
_UNUSED = re.compile(r"lm_head\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Weights(Protocol):
    """Named tensors of one checkpoint; only the block asked for is read."""

    where: Path

    def keys(self) -> set[str]:
        """The Hugging Face names of all tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape, from the file's header."""
        ...

    def dtype(self, key: str) -> np.dtype:
        """The dtype that `read` will give."""
        ...

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        """The tensor, or the block that `index` cuts out of it (one slice an axis)."""
        ...

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        ...


class SafetensorsWeights:
    """One or many `.safetensors` files of a directory, with or without an index."""

    def __init__(self, directory: Path):
        self.where = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
                raise UserError(f"{index}: field 'weight_map' does not map tensors to files")
            names = sorted(set(places.values()))
            missing = [name for name in names if not (directory / name).exists()]
            if missing:
                raise UserError(f"{index}: {missing[0]} is named there but is not in the directory")
        else:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            pickled = list(directory.glob("*.bin")) + list(directory.glob("*.pth"))
            raise UserError(
                f"{directory}: there is no .safetensors file"
                + (
                    f"; {pickled[0].name} is a pickle, which can run code when it is read: "
                    "convert it to safetensors first"
                    if pickled
                    else ""
                )
            )
        self._files: dict[str, SafetensorsFile] = {}
        for name in names:
            file = SafetensorsFile(directory / name)
            for key in file.places:
                if key in self._files:
                    raise UserError(f"{directory / name}: tensor {key!r} is in two files")
                self._files[key] = file

    def keys(self) -> set[str]:
        return set(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._files[key].places[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self._files[key].dtype(key)

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        return self._files[key].read(key, index)

    def files(self) -> list[Path]:
        return sorted({file.path for file in self._files.values()})


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; anything else is a `UserError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """What `check_tensors` found out about a checkpoint that fits."""

    has_head: bool
    unused: tuple[str, ...]


def check_tensors(weights: Weights, config: LlamaConfig, attributes: int) -> TensorCheck:
    """Compares a checkpoint's keys and shapes with the table, exactly.

    Args:
      weights: the checkpoint.
      config: its model's config.
      attributes: rows its `score.weight` must have, if there is one.

    Raises:
      UserError: a tensor is missing, unknown or of another shape.
    """
    found = weights.keys()
    expected: dict[str, tuple[int, ...]] = {}
    head = RewardHead(attributes)
    sizes = model_sizes(config, head)
    for row in model_parameters(config, head):
        if row.path == "head" and row.hf_key not in found:
            continue
        for key in hf_keys(row, config):
            expected[key] = hf_shape(row, sizes)
    unused = {key for key in found - set(expected) if _UNUSED.fullmatch(key)}
    missing, extra = sorted(set(expected) - found), sorted(found - set(expected) - unused)
    for problem, keys in (("missing", missing), ("not part of this model", extra)):
        if keys:
            raise UserError(
                f"{weights.where}: {len(keys)} tensor(s) {problem}: "
                + ", ".join(keys[:4])
                + (", ..." if len(keys) > 4 else "")
            )
    for key, shape in expected.items():
        if weights.shape(key) != shape:
            raise UserError(
                f"{weights.where}: tensor {key!r} has shape {weights.shape(key)}, but config.json "
                f"calls for {shape}"
            )
    return TensorCheck("score.weight" in found, tuple(sorted(unused)))


def common_dtype(weights: Weights, keys: Sequence[str]) -> np.dtype:
    """The dtype of tensors that become one array; of unequal precision, one that holds all."""
    dtypes = {weights.dtype(key) for key in keys}
    if len(dtypes) == 1:
        return dtypes.pop()
    # float16 and bfloat16 hold each other's values only as float32, which numpy would not pick.
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))
