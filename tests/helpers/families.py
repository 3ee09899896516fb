"""Tiny models of every family, with every switch of theirs off its default."""

from helpers.models import tiny_llama
from rmjax.models.decoder_config import FULL, SLIDING, DecoderConfig, Rope

_GELU = "gelu_pytorch_tanh"
_MIXED = (SLIDING, FULL, SLIDING)


def _tiny(**changes: object) -> DecoderConfig:
    """With a vocabulary for what the tokenizers' classes of families add to that of bytes."""
    return tiny_llama(vocab_size=264, **changes)


FAMILY_MODELS: dict[str, DecoderConfig] = {
    "mistral": _tiny(family="mistral", head_dim=16),
    "mistral_window": _tiny(family="mistral", sliding_window=7),
    "qwen2": _tiny(family="qwen2", tie_word_embeddings=True, rope=Rope(1e6)),
    "qwen2_windows": _tiny(family="qwen2", sliding_window=9, layer_types=(FULL, SLIDING, SLIDING)),
    "qwen3": _tiny(family="qwen3", head_dim=16, rope=Rope(1e6), rms_norm_eps=1e-3),
    "qwen3_windows": _tiny(
        family="qwen3",
        head_dim=16,
        attention_bias=True,
        sliding_window=5,
        layer_types=_MIXED,
        num_key_value_heads=1,
    ),
    "gemma2": _tiny(
        family="gemma2",
        hidden_act=_GELU,
        head_dim=16,
        attention_bias=True,
        query_pre_attn_scalar=23,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
        sliding_window=7,
        layer_types=_MIXED,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _tiny(
        family="gemma3_text",
        hidden_act=_GELU,
        head_dim=16,
        query_pre_attn_scalar=24,
        final_logit_softcapping=2.5,
        sliding_window=6,
        layer_types=_MIXED,
        rope=Rope(1e6, "linear", 8.0),
        rope_local=Rope(1e4),
        tie_word_embeddings=True,
    ),
}
