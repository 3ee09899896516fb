"""A value head beside a causal model: a linear layer with a bias on its last hidden state.

LLaMA-Factory keeps it in `value_head.safetensors`, TRL's `AutoModelForCausalLMWithValueHead` among
the model's tensors.

    D embed
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from rmjax.checkpoints.hf_weights import Weights
from rmjax.checkpoints.safetensors_file import SafetensorsFile
from rmjax.checkpoints.weight_files import VALUE_HEAD, refused_pickle
from rmjax.errors import UserError
from rmjax.models.decoder_config import DecoderConfig

VALUE_HEAD_KEYS = _WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"
_PICKLE = "value_head.bin"
_LAYER = re.compile(r"(score|v_head|v_head\.summary)\.\d+\.(weight|bias)")


class ValueHead(NamedTuple):
    """A reward head of one output.

    Attributes:
      weight: of the last hidden state.
      bias: what is added; 0 for none.
    """

    weight: Float32[np.ndarray, "D 1"]
    bias: float


def refuse_layered_head(where: Path, keys: Collection[str]) -> None:
    """Raises a `UserError` if a model's reward head has layers, with a nonlinearity between them.

    As INF-ORM's has (`score.0`, `score.2`) and GRM's (`v_head.summary.0`, `v_head.summary.2`).
    """
    layers = sorted(key for key in keys if _LAYER.fullmatch(key))
    if layers:
        raise UserError(
            f"{where}: a reward head of several layers ({', '.join(layers)}), as of INF-ORM and "
            "GRM, is not read; a head is one linear layer here, as in the classes of transformers "
            "that other programs load. docs/convert.md says more"
        )


def find_value_head(directory: Path, keys: Collection[str]) -> Path | None:
    """Where a model's value head is: a file of its own, or the directory if it is among `keys`.

    The file may be a pickle, which `read_value_head` refuses.

    Raises:
      UserError: it is there twice.
    """
    file, among = directory / VALUE_HEAD, _WEIGHT in keys
    if among and file.exists():
        raise UserError(
            f"{directory}: two value heads, {VALUE_HEAD} and {_WEIGHT!r} among the model's "
            "tensors; remove the one that is not meant"
        )
    if among:
        return directory
    return next((path for path in (file, directory / _PICKLE) if path.exists()), None)


def read_value_head(where: Path, weights: Weights, decoder: DecoderConfig) -> ValueHead:
    """The value head that `find_value_head` found.

    Args:
      where: what it returned.
      weights: the model's.
      decoder: the model's config.

    Raises:
      UserError: it is a pickle, has other tensors than a value head of one output, or is for
        another size of model.
    """
    if where.name == _PICKLE:
        raise UserError(f"{where.parent}: {refused_pickle(where.name)}")
    tensors = weights if where.is_dir() else SafetensorsFile(where)
    if isinstance(tensors, SafetensorsFile):
        shapes = {key: entry.shape for key, entry in tensors.entries.items()}
    else:
        found = {_WEIGHT, _BIAS} & tensors.keys()
        shapes = {key: tensors.shape(key) for key in found}
    expected = {_WEIGHT: (1, decoder.hidden_size), _BIAS: (1,)}
    if shapes not in (expected, {_WEIGHT: expected[_WEIGHT]}):
        raise UserError(f"{where}: expected the tensors {expected} of a value head, found {shapes}")
    bias = float(tensors.read(_BIAS)[0]) if _BIAS in shapes else 0.0
    return ValueHead(tensors.read(_WEIGHT).astype(np.float32).T, bias)
