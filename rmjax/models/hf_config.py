"""The shape of a Llama, read from and written to Hugging Face's `config.json`.

Every constant comes from the model's own file: a wrong `rope_theta` or `rms_norm_eps` changes the
scores and breaks nothing else. What this project does not compute exactly is refused by name.
"""

import dataclasses
from typing import Any

from rmjax.errors import UserError
from rmjax.models.decoder_config import DecoderConfig, Rope

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


def config_from_hf(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Reads the contents of a `config.json`, in transformers 4's or 5's spelling.

    Args:
      raw: the parsed file.
      where: the file's path, for messages.

    Raises:
      UserError: a field is missing, or has a value whose model would be computed wrongly here.
    """

    def required(field: str, kind: type, default: Any = None) -> Any:
        value = raw.get(field)
        if value is None:
            value = default
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
    kv_heads = required("num_key_value_heads", int, default=heads)
    hidden = required("hidden_size", int)
    if heads % kv_heads:
        raise UserError(
            f"{where}: field 'num_key_value_heads' is {kv_heads}, which does not divide "
            f"'num_attention_heads' = {heads}"
        )
    if raw.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{where}: field 'hidden_size' = {hidden} is not a multiple of "
            f"'num_attention_heads' = {heads}, and there is no 'head_dim'"
        )
    head_dim = required("head_dim", int, default=hidden // heads)
    if head_dim % 2:
        raise UserError(f"{where}: field 'head_dim' is {head_dim}; RoPE needs an even number")
    return DecoderConfig(
        vocab_size=required("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=required("intermediate_size", int),
        num_hidden_layers=required("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=required("max_position_embeddings", int),
        rms_norm_eps=required("rms_norm_eps", float),
        rope=_rope_from_hf(raw, where),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        initializer_range=required("initializer_range", float, default=0.02),
    )


def _rope_from_hf(raw: dict[str, Any], where: str) -> Rope:
    """transformers 5 has `rope_parameters`; 4 has `rope_theta` and perhaps `rope_scaling`.

    Where a file has both, transformers 4 and 5 alike go by `rope_scaling`.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    settings = raw.get(field) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: field {field!r} is {settings!r}, expected a mapping")
    for name, value in settings.items():
        if isinstance(value, dict):
            raise UserError(f"{where}: field '{field}.{name}' is a RoPE of its own; only one fits")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: field '{field}.rope_type' is {kind!r}; supported: {ROPE_TYPES}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: field '{field}.partial_rotary_factor' is not 1")

    def number(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"{where}: field {name!r} is {value!r}; RoPE type {kind!r} needs a positive number"
            )
        return float(value)

    def setting(name: str) -> float:
        return number(f"{field}.{name}", settings.get(name))

    # Llama's own first configs leave the base out; it was 10,000 then (transformers agrees).
    outer, inner = raw.get("rope_theta"), settings.get("rope_theta")
    if None not in (outer, inner) and outer != inner:
        raise UserError(
            f"{where}: field 'rope_theta' is {outer!r}, but '{field}.rope_theta' is {inner!r}"
        )
    known = [value for value in (inner, outer, 10000.0) if value is not None]
    rope = Rope(theta=number("rope_theta", known[0]))
    if kind == "default":
        return rope
    rope = dataclasses.replace(rope, type=kind, factor=setting("factor"))
    if kind != "llama3":
        return rope
    rope = dataclasses.replace(
        rope,
        low_freq_factor=setting("low_freq_factor"),
        high_freq_factor=setting("high_freq_factor"),
        original_max_position_embeddings=int(setting("original_max_position_embeddings")),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise UserError(
            f"{where}: field '{field}.high_freq_factor' is {rope.high_freq_factor:g}, expected "
            f"more than 'low_freq_factor' = {rope.low_freq_factor:g}"
        )
    return rope


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` fields of `config`, readable by transformers 4 and 5 alike.

    Both spellings of RoPE are written, and they agree.
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
