"""The Llamas that config files name, as their makers' `config.json` states them."""

from rmjax.models.decoder_config import DecoderConfig, Rope


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
