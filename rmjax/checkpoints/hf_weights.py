"""A checkpoint's tensors under Hugging Face's names, read block by block, and checked.

Nothing here runs code from a file: PyTorch's pickled `.bin` files are refused.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.safetensors_file import SafetensorsFile
from rmjax.checkpoints.tensor_slices import SLICE_BYTES, cut
from rmjax.checkpoints.weight_files import weight_files
from rmjax.errors import UserError
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import Head, LanguageModelHead, model_parameters, model_sizes
from rmjax.models.parameters import DECODER, HEAD, LM_HEAD

# Tensors that a checkpoint may have and a reward model does not need.
_UNUSED = re.compile(
    r"lm_head\.weight|v_head\.summary\.(weight|bias)"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
_BARE = re.compile(r"(embed_tokens|layers|norm)\.")  # a decoder's keys without `model.`


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
    """The `.safetensors` files of a directory, see `weight_files`.

    A bare decoder, as transformers' `AutoModel` saves it, has keys without `model.` in front; here
    they have it.
    """

    def __init__(self, directory: Path):
        self.where = directory
        stored: dict[str, SafetensorsFile] = {}
        for name in weight_files(directory):
            file = SafetensorsFile(directory / name)
            for key in file.entries:
                if key in stored:
                    raise UserError(f"{directory / name}: tensor {key!r} is in two files")
                stored[key] = file
        bare = {key for key in stored if _BARE.match(key)}
        full = {key for key in stored if key.startswith("model.")}
        if bare and full:
            raise UserError(
                f"{directory}: tensors of two models, with and without 'model.' in front: "
                f"{min(bare)!r} and {min(full)!r}; delete the files of the one that is not meant"
            )
        self._tensors = {
            (f"model.{key}" if key in bare else key): (file, key) for key, file in stored.items()
        }

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        file, stored = self._tensors[key]
        return file.entries[stored].shape

    def dtype(self, key: str) -> np.dtype:
        file, stored = self._tensors[key]
        return file.dtype(stored)

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        file, stored = self._tensors[key]
        return file.read(stored, index)

    def files(self) -> list[Path]:
        return sorted({file.path for file, _ in self._tensors.values()})


class HeadedWeights:
    """A model's weights with a reward head that is not, or not the one, among them."""

    def __init__(self, weights: Weights, head: Float32[np.ndarray, "D A"]):
        self.where = weights.where
        self._weights, self._head = weights, np.ascontiguousarray(head.T)

    def keys(self) -> set[str]:
        return self._weights.keys() | {HEAD.hf_key}

    def shape(self, key: str) -> tuple[int, ...]:
        return self._head.shape if key == HEAD.hf_key else self._weights.shape(key)

    def dtype(self, key: str) -> np.dtype:
        return self._head.dtype if key == HEAD.hf_key else self._weights.dtype(key)

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        return self._head[tuple(index)] if key == HEAD.hf_key else self._weights.read(key, index)

    def files(self) -> list[Path]:
        return self._weights.files()


def check_tensors(weights: Weights, config: DecoderConfig, head: Head) -> tuple[str, ...]:
    """Compares a checkpoint's keys and shapes with those of the table of parameters.

    Args:
      weights: the checkpoint.
      config: its model's config.
      head: the model's; a reward head may be missing.

    Returns:
      The keys that the model does not need.

    Raises:
      UserError: a tensor is missing, unknown or of another shape; or a language model is said to
        have the embedding as its head, and has another one.
    """
    keys = weights.keys()
    if config.num_hidden_layers > len(keys):  # a config can say 10^9
        raise UserError(
            f"{weights.where}: {len(keys)} tensors, fewer than the {config.num_hidden_layers:,} "
            "layers of config.json ('num_hidden_layers')"
        )
    expected: dict[str, tuple[int, ...]] = {}
    sizes = model_sizes(config, head)
    for row in model_parameters(config, head):
        if row == HEAD and row.hf_key not in keys:
            continue
        for key in hf_keys(row, config):
            expected[key] = hf_shape(row, sizes)
    unused = {key for key in keys - set(expected) if _UNUSED.fullmatch(key)}
    missing, extra = sorted(set(expected) - keys), sorted(keys - set(expected) - unused)
    problems = [
        f"{len(wrong)} tensor(s) {problem}: " + ", ".join(wrong[:4]) + ", ..." * (len(wrong) > 4)
        for problem, wrong in (("missing", missing), ("not part of this model", extra))
        if wrong
    ]
    if LM_HEAD.hf_key in missing:
        problems.append(
            "config.json's 'tie_word_embeddings' is false or absent; if the embedding is the head, "
            "set it to true"
        )
    if problems:
        raise UserError(f"{weights.where}: {'; '.join(problems)}")
    for key, shape in expected.items():
        if weights.shape(key) != shape:
            raise UserError(
                f"{weights.where}: tensor {key!r} has shape {weights.shape(key)}, but config.json "
                f"calls for {shape}"
            )
    if isinstance(head, LanguageModelHead) and head.tied and LM_HEAD.hf_key in keys:
        _check_tied(weights)
    return tuple(sorted(unused))


def _check_tied(weights: Weights) -> None:
    """Raises a `UserError` if `lm_head` is another matrix than the embedding, which is to be both.

    transformers 4 takes the embedding then, and transformers 5 the `lm_head`.
    """
    one, other = DECODER[0].hf_key, LM_HEAD.hf_key
    rows, size = weights.shape(one)
    step = max(1, SLICE_BYTES // (size * weights.dtype(one).itemsize))
    if weights.shape(other) == (rows, size) and all(
        np.array_equal(weights.read(one, [slice(*band)]), weights.read(other, [slice(*band)]))
        for band in cut(rows, step)
    ):
        return
    raise UserError(
        f"{weights.where}: config.json's 'tie_word_embeddings' is true, but {other!r} is not equal "
        f"to {one!r}, so the model has two possible heads; set the field to false to take "
        f"{other!r}, or remove the tensor"
    )


def common_dtype(weights: Weights, keys: Sequence[str]) -> np.dtype:
    """The dtype for tensors that become one array: theirs, or one that holds all their values."""
    dtypes = {weights.dtype(key) for key in keys}
    if len(dtypes) == 1:
        return dtypes.pop()
    # float16 and bfloat16 hold each other's values only as float32, which numpy would not pick.
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))
