"""The one table of parameters: our path and axes, the Hugging Face key and its axes.

Shapes, shardings, initial values and conversion in both directions all read this table. The
layout is frozen for format version 0.1: changing a row means a new format version.

A model in training with LoRA has more rows, made of those of the weights that they adapt, and one
that learns from ordinal ratings a row for their thresholds.

    B row, L token, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab, A attribute
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rmjax.models.config import LlamaConfig
from rmjax.models.lora import NO_LORA, TARGETS, LoraConfig
from rmjax.runtime.sharding import Sharding, check_divisible

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row: a parameter here, and the tensor (or one tensor a layer) it is in HF's format.

    Attributes:
      path: where it is in our tree; rows under `layers/` are stacked over layers on axis 0.
      axes: our axes, by the names of `sharding.PARAMETER_AXES`, without the leading `layers`.
      hf_key: the HF key; `{}` is the layer's number.
      hf_axes: the HF tensor's axes, in einops' notation with the same names.
      init: how a model without weights starts.
      only_if: the field of `LlamaConfig` that must be true for this parameter to exist.
    """

    path: str
    axes: str
    hf_key: str
    hf_axes: str
    init: Literal["normal", "fan_in", "ones", "zeros"] = "normal"
    only_if: str = ""

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is the layer."""
        return self.path.startswith("layers/")

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Our axes, with `layers` in front where the parameter is stacked."""
        return (("layers",) if self.stacked else ()) + tuple(self.axes.split())


_LAYER = "model.layers.{}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

# fmt: off
PARAMETERS: tuple[Parameter, ...] = (
    Parameter("embed", "vocab embed", "model.embed_tokens.weight", "vocab embed"),
    Parameter("layers/attention_norm", "norm", _LAYER + "input_layernorm.weight", "norm", "ones"),
    Parameter("layers/q", "embed heads head_dim", _ATTENTION + "q_proj.weight", "(heads head_dim) embed"),  # noqa: E501
    Parameter("layers/k", "embed kv_heads head_dim", _ATTENTION + "k_proj.weight", "(kv_heads head_dim) embed"),  # noqa: E501
    Parameter("layers/v", "embed kv_heads head_dim", _ATTENTION + "v_proj.weight", "(kv_heads head_dim) embed"),  # noqa: E501
    Parameter("layers/o", "heads head_dim embed", _ATTENTION + "o_proj.weight", "embed (heads head_dim)"),  # noqa: E501
    Parameter("layers/q_bias", "heads head_dim", _ATTENTION + "q_proj.bias", "(heads head_dim)", "zeros", "attention_bias"),  # noqa: E501
    Parameter("layers/k_bias", "kv_heads head_dim", _ATTENTION + "k_proj.bias", "(kv_heads head_dim)", "zeros", "attention_bias"),  # noqa: E501
    Parameter("layers/v_bias", "kv_heads head_dim", _ATTENTION + "v_proj.bias", "(kv_heads head_dim)", "zeros", "attention_bias"),  # noqa: E501
    Parameter("layers/o_bias", "norm", _ATTENTION + "o_proj.bias", "norm", "zeros", "attention_bias"),  # noqa: E501
    Parameter("layers/mlp_norm", "norm", _LAYER + "post_attention_layernorm.weight", "norm", "ones"),  # noqa: E501
    Parameter("layers/gate", "embed mlp", _MLP + "gate_proj.weight", "mlp embed"),
    Parameter("layers/up", "embed mlp", _MLP + "up_proj.weight", "mlp embed"),
    Parameter("layers/down", "mlp embed", _MLP + "down_proj.weight", "embed mlp"),
    Parameter("layers/gate_bias", "mlp", _MLP + "gate_proj.bias", "mlp", "zeros", "mlp_bias"),
    Parameter("layers/up_bias", "mlp", _MLP + "up_proj.bias", "mlp", "zeros", "mlp_bias"),
    Parameter("layers/down_bias", "norm", _MLP + "down_proj.bias", "norm", "zeros", "mlp_bias"),
    Parameter("final_norm", "norm", "model.norm.weight", "norm", "ones"),
    Parameter("head", "embed attribute", "score.weight", "attribute embed"),
)
# fmt: on

_PEFT = "base_model.model."  # what PEFT's format puts in front of every key


def _adapters(row: Parameter) -> tuple[Parameter, Parameter]:
    """LoRA's A and B of a weight, whose HF tensor has what comes out first; keys are PEFT's."""
    found = re.fullmatch(r"(\(.+\)|\w+) (\(.+\)|\w+)", row.hf_axes)
    assert found
    (left, right), key = found.groups(), _PEFT + row.hf_key.removesuffix("weight")
    a, b = f"{right.strip('()')} rank", f"rank {left.strip('()')}"
    return (
        Parameter(f"{row.path}_lora_a", a, f"{key}lora_A.weight", f"rank {right}", "fan_in"),
        Parameter(f"{row.path}_lora_b", b, f"{key}lora_B.weight", f"{left} rank", "zeros"),
    )


ADAPTERS = {p.path: _adapters(p) for p in PARAMETERS if p.path.removeprefix("layers/") in TARGETS}
# What LoRA trains: nothing else has gradients or optimizer state.
ADAPTED = (r"layers/\w+_lora_[ab]", "head|thresholds")
# Of `ordinal.py`. No tensor of Hugging Face's: what they come to is in `rmjax.json`.
THRESHOLDS = Parameter("thresholds", "threshold attribute", "", "", "zeros")


def model_parameters(
    config: LlamaConfig, lora: LoraConfig = NO_LORA, thresholds: int = 0
) -> Iterator[Parameter]:
    """The rows of the table that a model of this config has."""
    for row in PARAMETERS:
        if not row.only_if or getattr(config, row.only_if):
            yield row
    yield from adapter_parameters(lora)
    if thresholds:
        yield THRESHOLDS


def peft_parameters(lora: LoraConfig) -> Iterator[Parameter]:
    """The rows of an adapter in PEFT's format: those of LoRA, and the head."""
    yield from adapter_parameters(lora)
    head = next(row for row in PARAMETERS if row.path == "head")
    yield dataclasses.replace(head, hf_key=_PEFT + head.hf_key)


def adapter_parameters(lora: LoraConfig) -> Iterator[Parameter]:
    """The rows that LoRA adds."""
    for path, rows in ADAPTERS.items():
        if lora.adapts(path):
            yield from rows


def axis_sizes(
    config: LlamaConfig, attributes: int, lora: LoraConfig = NO_LORA, thresholds: int = 0
) -> dict[str, int]:
    """The size of every axis name of the table."""
    sizes = {
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "attribute": attributes,
    }
    optional = {"rank": lora.rank, "threshold": thresholds}
    return sizes | {axis: size for axis, size in optional.items() if size}


def abstract_params(
    config: LlamaConfig,
    attributes: int,
    sharding: Sharding,
    dtype: Any = jnp.float32,
    lora: LoraConfig = NO_LORA,
    thresholds: int = 0,
) -> Params:
    """Shapes, dtypes and shardings of a model's parameters, without any array.

    Raises:
      UserError: an axis does not divide over its mesh axes.
    """
    sizes = axis_sizes(config, attributes, lora, thresholds)
    leaves = {}
    for row in model_parameters(config, lora, thresholds):
        shape = tuple(sizes[axis] for axis in row.all_axes)
        placed = sharding.parameter(row.all_axes)
        check_divisible(f"parameter {row.path}", shape, placed)
        leaves[row.path] = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    return nest(leaves)


def in_float32(path: str) -> bool:
    """Whether a parameter is float32 whatever the others are: norms, head, thresholds, adapters."""
    return path in ("head", "thresholds") or "norm" in path or "_lora_" in path


def nest(leaves: dict[str, Any]) -> Params:
    """`{"layers/q": x}` to `{"layers": {"q": x}}`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """`{"layers": {"q": x}}` to `{"layers/q": x}`, the inverse of `nest`."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        leaves |= flatten(node, path + "/") if isinstance(node, dict) else {path: node}
    return leaves


def initializer(row: Parameter, config: LlamaConfig) -> Callable[..., jax.Array]:
    """`init(key, shape, dtype)` for a parameter that no checkpoint gives."""
    if row.init == "ones":
        return jax.nn.initializers.ones
    if row.init == "zeros":
        return jax.nn.initializers.zeros
    if row.init == "fan_in":
        return _normal_by_fan_in
    return jax.nn.initializers.normal(config.initializer_range)


def _normal_by_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, of a variance that is one over all that is summed over: every axis but the last."""
    return jax.nn.initializers.normal(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)
