"""GGUF files, written by the reference package."""

from pathlib import Path

import gguf
import numpy as np

from rmjax.models.decoder_config import DecoderConfig


def write_gguf(
    path: Path, decoder: DecoderConfig, state: dict[str, np.ndarray], architecture="llama", **fields
) -> Path:
    """A Llama as llama.cpp's converter writes it; `fields` are changed, or None: left out."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "vocab_size": decoder.vocab_size,
        "embedding_length": decoder.hidden_size,
        "feed_forward_length": decoder.intermediate_size,
        "block_count": decoder.num_hidden_layers,
        "attention.head_count": decoder.num_attention_heads,
        "attention.head_count_kv": decoder.num_key_value_heads,
        "attention.key_length": decoder.head_dim,
        "context_length": decoder.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": decoder.rms_norm_eps,
        "rope.freq_base": decoder.rope.theta,
    } | fields
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, decoder.num_hidden_layers)
    for key, tensor in state.items():
        for projection, heads in (
            ("q_proj", decoder.num_attention_heads),
            ("k_proj", decoder.num_key_value_heads),
        ):
            if projection in key:  # llama.cpp's own permutation, convert_hf_to_gguf.py
                shape = (heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
                tensor = np.ascontiguousarray(tensor.reshape(shape).swapaxes(1, 2)).reshape(
                    tensor.shape
                )
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name or key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
