"""The shape of a Llama, read from and written to Hugging Face's `config.json`.

Every constant comes from the model's own file: a wrong `rope_theta` or `rms_norm_eps` changes the
scores and breaks nothing else. What this project does not compute exactly is refused by name.
"""

import dataclasses
from typing import Any

from rmjax.errors import UserError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
_ARCHITECTURES = ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel")
# What would change the numbers, and the only values for which this model's numbers are right.
_ONLY = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


@dataclasses.dataclass(unsafe_hash=True)
class Rope:
    """Rotary position embedding: its base and, for long contexts, how it is stretched."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, like the two below
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(unsafe_hash=True)
class LlamaConfig:
    """Sizes and constants of a Llama; the names are those of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope = dataclasses.field(default_factory=Rope)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02


def llama_config_from_hf(raw: dict[str, Any], where: str) -> LlamaConfig:
    """Reads the contents of a `config.json`, in transformers 4's or 5's spelling.

    Args:
      raw: the parsed file.
      where: the file's path, for messages.

    Raises:
      UserError: a field is missing, or has a value whose model would be computed wrongly here.
    """

    def required(field: str, kind: type) -> Any:
        value = raw.get(field)
        if value is None:
            raise UserError(f"{where}: field {field!r} is missing")
        if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)):
            raise UserError(f"{where}: field {field!r} is {value!r}, expected {kind.__name__}")
        if value <= 0:
            raise UserError(f"{where}: field {field!r} is {value!r}, expected a positive number")
        return kind(value)

    for field, allowed in _ONLY.items():
        if field == "model_type" and field not in raw:
            raise UserError(f"{where}: field 'model_type' is missing; this is not a Llama's config")
        if field in raw and raw[field] not in allowed:
            raise UserError(
                f"{where}: field {field!r} is {raw[field]!r}; supported here: "
                + ", ".join(repr(v) for v in allowed if v is not None)
                + (" or absent" if None in allowed else "")
            )
    for name in raw.get("architectures") or []:
        if name not in _ARCHITECTURES:
            raise UserError(
                f"{where}: field 'architectures' names {name!r}; supported: {_ARCHITECTURES}"
            )
    for kind in raw.get("layer_types") or []:
        if kind != "full_attention":
            raise UserError(f"{where}: field 'layer_types' has {kind!r}; only 'full_attention'")

    heads = required("num_attention_heads", int)
    kv_heads = raw.get("num_key_value_heads") or heads
    hidden = required("hidden_size", int)
    if heads % kv_heads:
        raise UserError(
            f"{where}: field 'num_key_value_heads' is {kv_heads}, which does not divide "
            f"'num_attention_heads' = {heads}"
        )
    if not raw.get("head_dim") and hidden % heads:
        raise UserError(
            f"{where}: field 'hidden_size' = {hidden} is not a multiple of "
            f"'num_attention_heads' = {heads}, and there is no 'head_dim'"
        )
    return LlamaConfig(
        vocab_size=required("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=required("intermediate_size", int),
        num_hidden_layers=required("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        max_position_embeddings=required("max_position_embeddings", int),
        rms_norm_eps=required("rms_norm_eps", float),
        rope=_rope_from_hf(raw, where),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
    )


def _rope_from_hf(raw: dict[str, Any], where: str) -> Rope:
    """transformers 5 has `rope_parameters`; 4 has `rope_theta` and perhaps `rope_scaling`."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    settings = raw.get(field) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: field {field!r} is {settings!r}, expected a mapping")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{where}: field '{field}.rope_type' is {kind!r}; supported: {ROPE_TYPES}"
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: field '{field}.partial_rotary_factor' is not 1")

    def number(name: str) -> float:
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{where}: field '{field}.{name}' is {value!r}; RoPE type {kind!r} needs a number"
            )
        return float(value)

    # Llama's own first configs leave the base out; it was 10,000 then (transformers agrees).
    rope = Rope(theta=float(settings.get("rope_theta", raw.get("rope_theta") or 10000.0)))
    if kind == "default":
        return rope
    rope = dataclasses.replace(rope, type=kind, factor=number("factor"))
    if kind != "llama3":
        return rope
    return dataclasses.replace(
        rope,
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_position_embeddings=int(number("original_max_position_embeddings")),
    )


def llama_config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` fields of `config`, readable by transformers 4 and 5 alike.

    Both spellings of RoPE are written: each version reads its own and ignores the other.
    """
    rope = config.rope
    settings: dict[str, Any] = {"rope_type": rope.type}
    if rope.type != "default":
        settings["factor"] = rope.factor
    if rope.type == "llama3":
        settings |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    fields = dataclasses.asdict(config)
    del fields["rope"]
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        **fields,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else settings,
        "rope_parameters": {**settings, "rope_theta": rope.theta},
    }
