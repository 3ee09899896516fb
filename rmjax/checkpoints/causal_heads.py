"""Rewards that a causal model brings along: the logit of a token, or a value head.

Both are a linear function of the last hidden state, so both become a reward head of one output.

- NVIDIA's Llama-3.1-Nemotron-70B-Reward-HF and its kin: the reward is the logit of token 0 after
  the conversation, which is row 0 of `lm_head`, or of the embedding where that is the head.
- LLaMA-Factory (`value_head.safetensors`) and TRL's `AutoModelForCausalLMWithValueHead` (among the
  model's tensors): a linear layer with a bias.

    D embed
"""

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
from rmjax.models.parameters import DECODER, LM_HEAD

VALUE_HEAD_KEYS = _WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"
_PICKLE = "value_head.bin"


class CausalHead(NamedTuple):
    """A reward head of one output.

    Attributes:
      weight: of the last hidden state.
      bias: what is added; 0 for none.
    """

    weight: Float32[np.ndarray, "D 1"]
    bias: float


def token_head(weights: Weights, decoder: DecoderConfig, token: int) -> CausalHead:
    """The head whose output is the logit of a token.

    Raises:
      UserError: there is no such token, or no language-model head.
    """
    if not 0 <= token < decoder.vocab_size:
        raise UserError(
            f"reward token {token}: the model's tokens are 0 to {decoder.vocab_size - 1}"
        )
    key = (DECODER[0] if decoder.tie_word_embeddings else LM_HEAD).hf_key
    if key not in weights.keys():  # noqa: SIM118  (not a mapping)
        raise UserError(f"{weights.where}: tensor {key!r} is missing, so tokens have no logits")
    expected = (decoder.vocab_size, decoder.hidden_size)
    if weights.shape(key) != expected:
        raise UserError(
            f"{weights.where}: tensor {key!r} has shape {weights.shape(key)}, but config.json "
            f"calls for {expected}"
        )
    return CausalHead(weights.read(key, [slice(token, token + 1)]).astype(np.float32).T, 0.0)


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


def read_value_head(where: Path, weights: Weights, decoder: DecoderConfig) -> CausalHead:
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
    return CausalHead(tensors.read(_WEIGHT).astype(np.float32).T, bias)
