"""The shape of a decoder, read from and written to Hugging Face's `config.json`.

Every constant comes from the model's own file: a wrong `rope_theta` or `rms_norm_eps` changes the
scores and breaks nothing else. What this project does not compute exactly is refused by name.
Which families there are, and what is theirs, is in `families.py`.
"""

import dataclasses
from typing import Any

from rmjax.errors import UserError, shortened
from rmjax.models.decoder_config import ACTIVATIONS, FULL, SLIDING, DecoderConfig
from rmjax.models.families import FAMILIES, Family
from rmjax.models.hf_rope import MOST, rope_from_hf, rope_to_hf, ropes_from_hf

_MOST_LAYERS = 10_000  # a list of layers is made before there is anything to count
# What would change any family's numbers, and the only values for which they are right.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (None, 0, 0.0),
    "is_causal": (True,),  # transformers 5 takes another for attention both ways, in any family
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
    name = _family(raw, where)
    row = FAMILIES[name]
    _check_values(raw, row, where)
    given = {**row.defaults, **raw}  # a field that is null is not left out

    def required(field: str, kind: type, default: Any = None) -> Any:
        value = given.get(field)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{where}: field {field!r} is missing")
        return _positive(value, field, kind, where)

    def optional(field: str) -> float | None:
        if field not in row.fields or given.get(field) is None:
            return None
        return _positive(given[field], field, float, where)

    def chosen(field: str) -> bool:
        return field in row.fields and _boolean(given, field, where)

    hidden = required("hidden_size", int)
    heads = required("num_attention_heads", int)
    # Old Llamas leave it out. Elsewhere null means the same, and what is left out is asked for.
    left_out = "num_key_value_heads" not in raw and name != "llama"
    kv_heads = required("num_key_value_heads", int, default=None if left_out else heads)
    head_dim = required("head_dim", int, default=max(1, hidden // heads))
    _check_heads(hidden, heads, kv_heads, head_dim, given.get("head_dim") is not None, where)
    layers = required("num_hidden_layers", int)
    if layers > _MOST_LAYERS:
        raise UserError(
            f"{where}: field 'num_hidden_layers' is {layers:,}; at most {_MOST_LAYERS:,} are read"
        )
    window, types = _windows(given, row, layers, where)
    theta, local = row.defaults.get("rope_theta"), row.rope_local_theta
    if local is None:
        rope, rope_local = rope_from_hf(raw, where, theta), None
    else:
        rope, rope_local = ropes_from_hf(raw, where, theta, local)  # pyright: ignore[reportArgumentType]
    return DecoderConfig(
        vocab_size=required("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=required("intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=required("max_position_embeddings", int),
        rms_norm_eps=required("rms_norm_eps", float),
        rope=rope,
        tie_word_embeddings=_boolean(given, "tie_word_embeddings", where),
        attention_bias=chosen("attention_bias"),
        mlp_bias=chosen("mlp_bias"),
        initializer_range=required("initializer_range", float, default=0.02),
        family=name,
        hidden_act=_activation(given, row, where),
        query_pre_attn_scalar=(
            required("query_pre_attn_scalar", float)
            if "query_pre_attn_scalar" in row.fields
            else None
        ),
        attn_logit_softcapping=optional("attn_logit_softcapping"),
        final_logit_softcapping=optional("final_logit_softcapping"),
        sliding_window=window,
        layer_types=types,
        rope_local=rope_local,
    )


def _check_heads(
    hidden: int, heads: int, kv_heads: int, head_dim: int, stated: bool, where: str
) -> None:
    """Raises a `UserError` unless heads fit; `stated` says whether the file has `head_dim`."""
    if heads % kv_heads:
        raise UserError(
            f"{where}: field 'num_key_value_heads' is {kv_heads}, which does not divide "
            f"'num_attention_heads' = {heads}"
        )
    if not stated and hidden % heads:
        raise UserError(
            f"{where}: field 'hidden_size' = {hidden} is not a multiple of "
            f"'num_attention_heads' = {heads}, and there is no 'head_dim'"
        )
    if head_dim % 2:
        raise UserError(f"{where}: field 'head_dim' is {head_dim}; RoPE needs an even number")


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` fields of `config`, readable by transformers 4 and 5 alike.

    Raises:
      UserError: the config's family is unknown.
    """
    if config.family not in FAMILIES:
        raise UserError(f"field 'family' is {config.family!r}; supported: {', '.join(FAMILIES)}")
    row, fields = config.row, dataclasses.asdict(config)
    written: dict[str, Any] = {"model_type": config.family, row.activation: config.hidden_act}
    for name in _OF_ALL:
        written[name] = fields[name]
    for name in row.fields:
        written[name] = fields[name]
    scalar = config.query_pre_attn_scalar
    if scalar is not None and scalar == int(scalar):
        written["query_pre_attn_scalar"] = int(scalar)  # transformers asks for a whole number
    return written | _windows_to_hf(config) | rope_to_hf(config.rope, config.rope_local)


_OF_ALL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


def check_expressible(config: DecoderConfig, where: str) -> None:
    """That a `config.json` of the config's family can say what the config says.

    Args:
      config: of a decoder.
      where: what it is called, for messages.

    Raises:
      UserError: a field cannot be, in this family or at all.
    """
    read = config_from_hf(config_to_hf(config), where)
    for name, (said, understood) in _differing(config, read).items():
        raise UserError(
            f"{where}: field {name!r} is {said!r}, which a model of the family "
            f"{config.family!r} cannot have; read back it is {understood!r}"
        )


def _differing(one: DecoderConfig, other: DecoderConfig) -> dict[str, tuple[Any, Any]]:
    return {k: (v, vars(other)[k]) for k, v in vars(one).items() if v != vars(other)[k]}


def _family(raw: dict[str, Any], where: str) -> str:
    supported = ", ".join(map(repr, FAMILIES))
    if "model_type" not in raw:
        raise UserError(
            f"{where}: field 'model_type' is missing; this is not a decoder's config (supported: "
            f"{supported})"
        )
    name = raw["model_type"]
    if not isinstance(name, str) or name not in FAMILIES:
        hint = "; only its text model, 'gemma3_text', is read" if name == "gemma3" else ""
        raise UserError(f"{where}: field 'model_type' is {name!r}; supported: {supported}{hint}")
    return name


def _check_values(raw: dict[str, Any], row: Family, where: str) -> None:
    """Raises a `UserError` if a field says what the family's decoder here does not compute."""
    for field, allowed in {**_ONLY, **row.only}.items():
        if field in raw and raw[field] not in allowed:
            computed = [repr(v) for v in allowed if v is not None] + ["no such field"]
            raise UserError(
                f"{where}: field {field!r} is {shortened(repr(raw[field]))}; supported here: "
                + " or ".join(computed)
            )
    classes = (row.causal, row.classification, row.bare)
    names = raw.get("architectures")
    if not isinstance(names, list | None):
        raise UserError(f"{where}: field 'architectures' is {shortened(repr(names))}, no list")
    for name in names or []:
        if name not in classes:
            raise UserError(f"{where}: field 'architectures' names {name!r}; supported: {classes}")


def _positive(value: Any, field: str, kind: type, where: str) -> Any:
    said = f"{where}: field {field!r} is {shortened(repr(value))}, expected"
    if isinstance(value, bool) or not isinstance(value, kind if kind is int else (int, float)):
        raise UserError(f"{said} {kind.__name__}")
    if not 0 < value <= MOST:  # which NaN is not, either
        raise UserError(f"{said} a positive number, of {MOST:,} at most")
    return kind(value)


def _boolean(given: dict[str, Any], field: str, where: str) -> bool:
    value = given.get(field)
    if not isinstance(value, bool | None):
        raise UserError(f"{where}: field {field!r} is {shortened(repr(value))}, expected a boolean")
    return bool(value)


def _activation(given: dict[str, Any], row: Family, where: str) -> str:
    name = given.get(row.activation, "silu")
    if name not in ACTIVATIONS:
        raise UserError(
            f"{where}: field {row.activation!r} is {name!r}; supported: "
            + ", ".join(map(repr, ACTIVATIONS))
        )
    return name


# ---- which layers see a window only -------------------------------------------------------------


def _windows(
    given: dict[str, Any], row: Family, layers: int, where: str
) -> tuple[int | None, tuple[str, ...]]:
    """`sliding_window` and `layer_types` of a config, as `DecoderConfig` has them."""
    window = given.get("sliding_window")
    if row.windows == "above" and not _boolean(given, "use_sliding_window", where):
        window = None  # as transformers has it, whatever the field says
    if window is not None:
        window = _positive(window, "sliding_window", int, where)
    types = given.get("layer_types")
    if types is None:
        types = _usual_types(given, row, layers, window, where)
    if not isinstance(types, list | tuple) or len(types) != layers:
        raise UserError(
            f"{where}: field 'layer_types' is {shortened(repr(types))}, expected one for each of "
            f"{layers} layers"
        )
    known = (FULL,) if row.windows == "none" else (FULL, SLIDING)
    if row.windows == "all":  # of which transformers reads no types
        known = (SLIDING if window else FULL,)
    for name in types:
        if name not in known:
            raise UserError(
                f"{where}: field 'layer_types' has {shortened(repr(name))}; here only "
                + " and ".join(map(repr, known))
            )
    if SLIDING not in types:
        return None, ()
    if window is None:
        raise UserError(
            f"{where}: field 'layer_types' has {SLIDING!r}, and there is no 'sliding_window'"
        )
    return window, () if FULL not in types else tuple(types)


def _usual_types(
    given: dict[str, Any], row: Family, layers: int, window: int | None, where: str
) -> list[str]:
    """The types of layers where a file does not list them."""
    if row.windows == "none" or (window is None and row.windows != "pattern"):
        return [FULL] * layers
    if row.windows == "all":
        return [SLIDING] * layers
    if row.windows == "above":
        first = given["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise UserError(f"{where}: field 'max_window_layers' is {first!r}, expected int")
        return [SLIDING if n >= first else FULL for n in range(layers)]
    every = _positive(given["sliding_window_pattern"], "sliding_window_pattern", int, where)
    return [SLIDING if (n + 1) % every else FULL for n in range(layers)]


def _windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields that say windows, as the family's models read them."""
    window, count, how = config.sliding_window, config.num_hidden_layers, config.row.windows
    types = [FULL if width is None else SLIDING for width in config.windows]
    if how == "none":
        return {}
    if how == "all":
        return {"sliding_window": window}
    if how == "above":
        lowest = types.index(SLIDING) if SLIDING in types else count
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": lowest,
            "layer_types": types,
        }
    # These families' models ask for a window even where no layer has one.
    return {"sliding_window": window or config.max_position_embeddings, "layer_types": types}
