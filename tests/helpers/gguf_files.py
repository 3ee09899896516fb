"""GGUF files, written by the reference package."""

from pathlib import Path

import gguf
import numpy as np

from rmjax.models.decoder_config import LlamaConfig


def write_gguf(
    path: Path, llama: LlamaConfig, state: dict[str, np.ndarray], architecture="llama", **fields
) -> Path:
    """A Llama as llama.cpp's converter writes it; `fields` are changed, or None: left out."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "vocab_size": llama.vocab_size,
        "embedding_length": llama.hidden_size,
        "feed_forward_length": llama.intermediate_size,
        "block_count": llama.num_hidden_layers,
        "attention.head_count": llama.num_attention_heads,
        "attention.head_count_kv": llama.num_key_value_heads,
        "attention.key_length": llama.head_dim,
        "context_length": llama.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": llama.rms_norm_eps,
        "rope.freq_base": llama.rope.theta,
    } | fields
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, llama.num_hidden_layers)
    for key, tensor in state.items():
        for projection, heads in (
            ("q_proj", llama.num_attention_heads),
            ("k_proj", llama.num_key_value_heads),
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
