"""What the campaign damages: a tiny model in every form, and small data, all of them good."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rmjax.checkpoints.hf_mapping import hf_keys, hf_shape
from rmjax.checkpoints.model_files import write_model_files
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.models.decoder_config import DecoderConfig
from rmjax.models.heads import RewardHead, model_parameters, model_sizes
from rmjax.models.rewards.spec import RewardSpec

ATTRIBUTES = ("wit", "care")
DECODER = DecoderConfig(
    vocab_size=262,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A reward model's tensors under Hugging Face's names."""
    rng, head = np.random.default_rng(seed), RewardHead(len(ATTRIBUTES))
    sizes = model_sizes(DECODER, head)
    return {
        key: (rng.standard_normal(hf_shape(row, sizes)) * 0.1).astype(np.float32)
        for row in model_parameters(DECODER, head)
        for key in hf_keys(row, DECODER)
    }


def write_huggingface(directory: Path, longest: int = 128, seed: int = 0) -> Path:
    """A `LlamaForSequenceClassification` with its tokenizer and `rmjax.json`."""
    spec = RewardSpec(ATTRIBUTES, {ATTRIBUTES[0]: 1.0}, max_length=longest)
    decoder = dataclasses.replace(DECODER, max_position_embeddings=2 * longest)
    write_model_files(directory, decoder, byte_tokenizer(), spec)
    save_file(tensors(seed), directory / "model.safetensors", {"format": "pt"})
    return directory


def write_gguf(path: Path) -> Path:
    """A language model of the same sizes, as llama.cpp keeps it."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "vocab_size": DECODER.vocab_size,
        "embedding_length": DECODER.hidden_size,
        "feed_forward_length": DECODER.intermediate_size,
        "block_count": DECODER.num_hidden_layers,
        "attention.head_count": DECODER.num_attention_heads,
        "attention.head_count_kv": DECODER.num_key_value_heads,
        "attention.key_length": DECODER.head_dim,
        "context_length": DECODER.max_position_embeddings,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", DECODER.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, DECODER.num_hidden_layers)
    for key, tensor in tensors().items():
        if name := names.get_name(key, try_suffixes=(".weight",)):
            writer.add_tensor(name, tensor)
    writer.add_tensor("output.weight", tensors()["model.embed_tokens.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair_rows(count: int = 8) -> list[dict[str, Any]]:
    """Preference pairs."""
    return [
        {"prompt": f"Question {n}?", "chosen": f"The answer is {n}.", "rejected": f"No {n}"}
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
