"""The independent side of the numerical tests: transformers' classification models."""

import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from helpers.models import make_model
from rmjax.checkpoints.hf_mapping import hf_keys, to_hf
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.hf_config import config_to_hf
from rmjax.models.parameters import flatten


def torch_model(decoder: DecoderConfig, params, attributes: int, pad_token_id: int | None = None):
    """transformers' model with our parameters, float32, eager attention."""
    fields = config_to_hf(decoder)
    fields |= {"num_labels": attributes, "pad_token_id": pad_token_id}
    kind = transformers.CONFIG_MAPPING[decoder.family]
    config = kind.from_dict(fields | {"attn_implementation": "eager"})
    model = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    state = {
        k: torch.from_numpy(np.array(v)) for k, v in hf_state(decoder, params, attributes).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def hf_state(decoder: DecoderConfig, params, attributes: int) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) under Hugging Face's names."""
    sizes, flat, state = make_model(decoder, attributes).sizes, flatten(params), {}
    for row in make_model(decoder).parameters:
        keys = hf_keys(row, decoder)
        for layer, key in enumerate(keys):
            array = np.asarray(flat[row.path])
            state[key] = to_hf(row, array[layer] if row.stacked else array, sizes)
    return state


def torch_scores(model, sequences: list[np.ndarray]) -> np.ndarray:
    """Scores [N, A], one sequence at a time, so that nothing but the model is tested."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.stack(
            [
                model(torch.from_numpy(np.asarray(s)[None]).long()).logits[0].numpy()
                for s in sequences
            ]
        )


def save_torch(model, directory: Path, **kwargs) -> Path:
    model.save_pretrained(directory, **kwargs)
    return directory
