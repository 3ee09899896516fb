"""RoPE's fields of Hugging Face's `config.json`, in transformers 4's and 5's spelling."""

import dataclasses
from typing import Any

from rmjax.errors import UserError, shortened
from rmjax.models.decoder_config import FULL, SLIDING, Rope

MOST = 2**31 - 1  # of any number in a config: sizes are int32 on a device
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_THETA = 10000.0  # Llama's own first configs leave the base out; it was that (transformers agrees)


def rope_from_hf(raw: dict[str, Any], where: str, theta: float | None = None) -> Rope:
    """The RoPE of a model that has one.

    transformers 5 has `rope_parameters`; 4 has `rope_theta` and perhaps `rope_scaling`. Where a
    file has both, transformers 4 and 5 alike go by `rope_scaling`.

    Args:
      raw: the parsed file.
      where: the file's path, for messages.
      theta: the base where the file has none; None for Llama's.

    Raises:
      UserError: a field is of a kind that is not computed, or is no number.
    """
    field = (
        "rope_scaling"
        if _mapping(raw.get("rope_scaling"), "rope_scaling", where)
        else ("rope_parameters")
    )
    settings = _mapping(raw.get(field), field, where)
    for name, value in settings.items():
        if isinstance(value, dict):
            raise UserError(f"{where}: field '{field}.{name}' is a RoPE of its own; only one fits")
    return _rope(settings, field, ("rope_theta", raw.get("rope_theta")), theta, where)


def ropes_from_hf(
    raw: dict[str, Any], where: str, theta: float, local_theta: float
) -> tuple[Rope, Rope]:
    """The RoPE of full layers and that of layers with a window.

    transformers 5 has both in `rope_parameters`, by the type of layer. 4 has `rope_theta` and
    `rope_scaling` of the former and `rope_local_base_freq` of the latter.

    Args:
      raw: the parsed file.
      where: the file's path, for messages.
      theta: the base of full layers, where the file has none.
      local_theta: that of the others.

    Raises:
      UserError: a field is of a kind that is not computed, or is no number.
    """
    both = _mapping(raw.get("rope_parameters"), "rope_parameters", where)
    for name in both:
        if name not in (FULL, SLIDING):
            raise UserError(
                f"{where}: field 'rope_parameters.{name}' is unknown; this family has a RoPE for "
                f"{FULL!r} and one for {SLIDING!r}"
            )
    names = {kind: f"rope_parameters.{kind}" for kind in (FULL, SLIDING)}
    full, local = (_mapping(both.get(kind), names[kind], where) for kind in (FULL, SLIDING))
    scaling = _mapping(raw.get("rope_scaling"), "rope_scaling", where)
    field = "rope_scaling" if scaling else names[FULL]
    outer = ("rope_theta", raw.get("rope_theta"))
    rope = _rope(full | scaling, field, outer, theta, where)
    outer = ("rope_local_base_freq", raw.get("rope_local_base_freq"))
    rope_local = _rope(local, names[SLIDING], outer, local_theta, where)
    if rope_local.type != "default":
        raise UserError(
            f"{where}: field '{names[SLIDING]}.rope_type' is {rope_local.type!r}; supported: "
            "'default'"
        )
    return rope, rope_local


def _mapping(value: Any, field: str, where: str) -> dict[str, Any]:
    settings = {} if value is None else value
    if not isinstance(settings, dict):
        raise UserError(f"{where}: field {field!r} is {settings!r}, expected a mapping")
    return settings


def _rope(
    settings: dict[str, Any],
    field: str,
    outer: tuple[str, Any],
    default_theta: float | None,
    where: str,
) -> Rope:
    """One RoPE of settings that stand in `field`, its base perhaps in a field beside them."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"{where}: field '{field}.rope_type' is {kind!r}; supported: {ROPE_TYPES}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: field '{field}.partial_rotary_factor' is not 1")

    def number(name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= MOST:  # which NaN is not, either
            raise UserError(
                f"{where}: field {name!r} is {shortened(repr(value))}; RoPE type {kind!r} needs a "
                "positive number"
            )
        return float(value)

    def setting(name: str) -> float:
        return number(f"{field}.{name}", settings.get(name))

    name, beside = outer
    inner = settings.get("rope_theta")
    if None not in (beside, inner) and beside != inner:
        raise UserError(
            f"{where}: field {name!r} is {beside!r}, but '{field}.rope_theta' is {inner!r}"
        )
    known = [value for value in (inner, beside, default_theta, _THETA) if value is not None]
    rope = Rope(theta=number(name, known[0]))
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


def rope_to_hf(rope: Rope, rope_local: Rope | None) -> dict[str, Any]:
    """The fields of one RoPE, or of that of full layers and that of layers with a window.

    Both spellings are written, and they agree.
    """
    settings: dict[str, Any] = {"rope_type": rope.type}
    if rope.type != "default":
        settings["factor"] = rope.factor
    if rope.type == "llama3":
        settings |= {name: getattr(rope, name) for name in _LLAMA3}
    parameters: dict[str, Any] = {**settings, "rope_theta": rope.theta}
    fields = {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else settings,
        "rope_parameters": parameters,
    }
    if rope_local is None:
        return fields
    local = {"rope_type": rope_local.type, "rope_theta": rope_local.theta}
    return {
        **fields,
        "rope_local_base_freq": rope_local.theta,
        "rope_parameters": {FULL: parameters, SLIDING: local},
    }
