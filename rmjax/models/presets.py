"""The decoders that config files name, as their makers' `config.json` states them."""

import dataclasses

from rmjax.models.decoder_config import FULL, SLIDING, DecoderConfig, Rope


def llama31_8b() -> DecoderConfig:
    """Llama-3.1-8B and its Instruct."""
    return _llama31(hidden=4096, mlp=14336, layers=32, heads=32)


def llama31_70b() -> DecoderConfig:
    """Llama-3.1-70B and its Instruct."""
    return _llama31(hidden=8192, mlp=28672, layers=80, heads=64)


def llama31_405b() -> DecoderConfig:
    """Llama-3.1-405B and its Instruct."""
    return _llama31(hidden=16384, mlp=53248, layers=126, heads=128)


def smollm2_135m() -> DecoderConfig:
    """SmolLM2-135M-Instruct."""
    return DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=Rope(theta=100000.0),
        tie_word_embeddings=True,
    )


def _llama31(hidden: int, mlp: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Rope(
            theta=500000.0,
            type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )


def qwen3_06b() -> DecoderConfig:
    """Qwen3-0.6B."""
    return _qwen3(hidden=1024, mlp=3072, layers=28, heads=16, tied=True)


def qwen3_17b() -> DecoderConfig:
    """Qwen3-1.7B."""
    return _qwen3(hidden=2048, mlp=6144, layers=28, heads=16, tied=True)


def qwen3_4b() -> DecoderConfig:
    """Qwen3-4B."""
    return _qwen3(hidden=2560, mlp=9728, layers=36, heads=32, tied=True)


def qwen3_8b() -> DecoderConfig:
    """Qwen3-8B."""
    return _qwen3(hidden=4096, mlp=12288, layers=36, heads=32)


def qwen3_14b() -> DecoderConfig:
    """Qwen3-14B."""
    return _qwen3(hidden=5120, mlp=17408, layers=40, heads=40)


def qwen3_32b() -> DecoderConfig:
    """Qwen3-32B."""
    return _qwen3(hidden=5120, mlp=25600, layers=64, heads=64)


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool = False) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6),
        tie_word_embeddings=tied,
    )


def gemma3_1b() -> DecoderConfig:
    """Gemma 3 1B."""
    config = _gemma3(hidden=1152, mlp=6912, layers=26, heads=4, kv_heads=1)
    return dataclasses.replace(
        config,
        vocab_size=262144,
        max_position_embeddings=32768,
        sliding_window=512,
        rope=Rope(theta=1e6),
    )


def gemma3_4b() -> DecoderConfig:
    """The text model of Gemma 3 4B."""
    return _gemma3(hidden=2560, mlp=10240, layers=34, heads=8, kv_heads=4)


def gemma3_12b() -> DecoderConfig:
    """The text model of Gemma 3 12B."""
    return _gemma3(hidden=3840, mlp=15360, layers=48, heads=16, kv_heads=8)


def gemma3_27b() -> DecoderConfig:
    """The text model of Gemma 3 27B."""
    config = _gemma3(hidden=5376, mlp=21504, layers=62, heads=32, kv_heads=16)
    return dataclasses.replace(config, head_dim=128, query_pre_attn_scalar=168.0)


def _gemma3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        family="gemma3_text",
        vocab_size=262208,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6, type="linear", factor=8.0),
        rope_local=Rope(theta=10000.0),
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=256.0,
        sliding_window=1024,
        layer_types=tuple(SLIDING if (n + 1) % 6 else FULL for n in range(layers)),
    )


def quickstart() -> DecoderConfig:
    """A Llama for bytes that learns generated text in a minute; not a published one."""
    return DecoderConfig(
        vocab_size=262,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    )
