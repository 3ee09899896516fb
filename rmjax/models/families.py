"""The families of decoders: what all models of one `model_type` have, as rows of a table.

A family is data. What it says is computed by one decoder (`decoder.py`); what a model of it may
choose is in `DecoderConfig`, and `hf_config.py` reads that from `config.json` by the same row.
Every row was compared with the family's model in transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

_LAYER = "model.layers.{}."


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
      causal: transformers' class of a language model.
      classification: its class of a reward model.
      bare: its class of a decoder without a head.
      norm_offset: whether a norm multiplies by 1 + its weight.
      norms_after: whether what attention and the MLP give has norms too, before it is added.
      qk_norm: whether each head's queries and keys have norms, before RoPE.
      qkv_bias: whether q, k and v always have biases.
      scaled_embeddings: whether embeddings are multiplied by the square root of their size.
      hf_keys: tensors that do not have the names of the table of parameters, by path.
      fields: those of `DecoderConfig` that `config.json` may say and some families have not.
      defaults: what transformers takes where `config.json` leaves a field out.
      only: fields of `config.json` and the values for which the numbers are right; None: absent.
      activation: the name of the field that says the activation.
      windows: how `config.json` says which layers see a window only, if it has no `layer_types`:
        none do, all do, those above `max_window_layers`, or all but every nth.
      rope_local_theta: RoPE's base in layers with a window, where these have a RoPE of their own.
    """

    causal: str
    classification: str
    bare: str
    norm_offset: bool = False
    norms_after: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    scaled_embeddings: bool = False
    hf_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    windows: Literal["none", "all", "above", "pattern"] = "none"
    rope_local_theta: float | None = None


def _classes(name: str) -> tuple[str, str, str]:
    return f"{name}ForCausalLM", f"{name}ForSequenceClassification", f"{name}Model"


_NO_WINDOW: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
}
_NO_BIAS = {"attention_bias": (None, False), "mlp_bias": (None, False)}
_QWEN = {
    "mlp_bias": (None, False),
    "use_mrope": (None, False),
    "dual_chunk_attention_config": (None,),
}
_QWEN_DEFAULTS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA_KEYS = {
    "layers/attention_post_norm": _LAYER + "post_attention_layernorm.weight",
    "layers/mlp_norm": _LAYER + "pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": _LAYER + "post_feedforward_layernorm.weight",
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_ONLY = {"mlp_bias": (None, False), "use_bidirectional_attention": (None, False)}

FAMILIES = {
    "llama": Family(*_classes("Llama"), fields=("attention_bias", "mlp_bias"), only=_NO_WINDOW),
    "mistral": Family(
        *_classes("Mistral"),
        defaults={"sliding_window": 4096},
        only=_NO_BIAS,
        windows="all",
    ),
    "qwen2": Family(
        *_classes("Qwen2"),
        qkv_bias=True,
        defaults=_QWEN_DEFAULTS,
        only=_QWEN | {"attention_bias": (None,)},
        windows="above",
    ),
    "qwen3": Family(
        *_classes("Qwen3"),
        qk_norm=True,
        fields=("attention_bias",),
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        only=_QWEN,
        windows="above",
    ),
    "gemma2": Family(
        *_classes("Gemma2"),
        norm_offset=True,
        norms_after=True,
        scaled_embeddings=True,
        hf_keys=_GEMMA_KEYS,
        fields=(
            "attention_bias",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        defaults=_GEMMA_DEFAULTS
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        only=_GEMMA_ONLY | {"sliding_window_pattern": (None, 2)},
        activation="hidden_activation",
        windows="pattern",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        "Gemma3TextModel",
        norm_offset=True,
        norms_after=True,
        qk_norm=True,
        scaled_embeddings=True,
        hf_keys=_GEMMA_KEYS,
        fields=("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        defaults=_GEMMA_DEFAULTS | {"rope_theta": 1e6, "sliding_window_pattern": 6},
        # transformers reads a soft cap of attention's logits here, and does not compute it.
        only=_GEMMA_ONLY | {"attn_logit_softcapping": (None,)},
        activation="hidden_activation",
        windows="pattern",
        rope_local_theta=10000.0,
    ),
}
