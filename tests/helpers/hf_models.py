"""Hugging Face models in directories: written, changed, and read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.models import make_model, tiny_llama
from rmjax.checkpoints.hf_mapping import from_hf, hf_keys
from rmjax.checkpoints.hf_weights import SafetensorsWeights
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.hf_config import config_from_hf, config_to_hf
from rmjax.runtime.files import read_json

# Neither sorted nor HelpSteer2's: their order must survive because it is kept.
NAMES = ("zeal", "care", "wit", "anger", "length")


TALK = [
    [
        {"role": "user", "content": "Hi, é?"},
        {"role": "assistant", "content": "Hello there."},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue, and not green?"},
        {"role": "assistant", "content": "Rayleigh."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A physicist."},
    ],
    [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<|end|>2"},
    ],
]


DATED_TEMPLATE = (
    "{{ bos_token }}"
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}'
    '{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}{% endif %}'
    "{{ 'Today Date: ' + date_string }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
)


def save_hf(
    directory: Path,
    decoder: DecoderConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = NAMES,
    causal: bool = False,
    tokenizer=None,
    seed: int = 0,
    **save,
) -> Path:
    """A tiny random Llama as transformers saves it: a reward model, or a causal one."""
    fields = config_to_hf(decoder or tiny_llama())
    if not causal:
        fields |= {"id2label": dict(enumerate(names)), "problem_type": "regression"}
    kind: Any = transformers.CONFIG_MAPPING[fields.pop("model_type")]
    config = kind(**fields, pad_token_id=2)
    kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_config(config)
    with torch.no_grad():  # norms and biases off their initial values, so that they are seen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(directory, **save)
    (tokenizer or byte_tokenizer()).save_pretrained(directory)
    return directory


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a model in one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for key, tensor in changes.items():
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, file, {"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor to the bit: dtype, shape and bytes by key."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                assert key not in found
                array = tensors.get_tensor(key)
                found[key] = (array.dtype.name, array.shape, array.tobytes())
    return found


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def decoder_of(directory: Path) -> DecoderConfig:
    return config_from_hf(read_json(directory / "config.json"), str(directory))


def hf_arrays(source: Path, decoder: DecoderConfig) -> dict[str, np.ndarray]:
    """What the Orbax model must hold, put together without `orbax_arrays`."""
    weights, sizes = SafetensorsWeights(source), make_model(decoder, len(NAMES)).sizes
    arrays = {}
    for row in make_model(decoder).parameters:
        layers = [from_hf(row, weights.read(key), sizes) for key in hf_keys(row, decoder)]
        arrays[row.path] = np.stack(layers) if row.stacked else layers[0]
    return arrays


def same_bits(found, expected: np.ndarray) -> bool:
    found = np.asarray(found)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
