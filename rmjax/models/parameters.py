"""The one table of parameters: our path and axes, Hugging Face's key and axes, and all else.

Shapes, shardings, initial values, weight decay, LoRA, products in 8 bits, FLOPs and conversion in
both directions read this table. The layout is frozen for format version 0.1: changing a row's path
or axes means a new format version.

    B row, L token, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab, A attribute
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rmjax.models.decoder_config import NO_LORA, DecoderConfig, LoraConfig
from rmjax.runtime.sharding import Sharding, check_divisible

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row: a parameter here, and the tensor (or one tensor a layer) it is in HF's format.

    Attributes:
      path: its place in our tree; rows under `layers/` are stacked over layers on axis 0.
      axes: our axes, by the names of `sharding.PARAMETER_AXES`, without the leading `layers`.
      hf_key: the HF key; `{}` is the layer's number. Empty if HF has no such tensor. A family may
        have another, see `families.Family.hf_keys`.
      hf_axes: the HF tensor's axes, in einops' notation with the same names.
      init: how a model without weights starts.
      only_if: the field or property of `DecoderConfig` that must be true for this parameter to
        exist.
      summed: of a product with activations, the axes it sums over, which come first in `axes`;
        empty if the parameter is no factor of a product.
      decays: whether weight decay applies.
      float32: whether it is float32 whatever the dtype of the others is.
      moves_as_score: whether the optimizer moves it as fast as it moves a score, which sums over
        `embed` weights, and not as fast as one weight.
    """

    path: str
    axes: str
    hf_key: str = ""
    hf_axes: str = ""
    init: Literal["normal", "fan_in", "norm", "zeros"] = "normal"
    only_if: str = ""
    summed: str = ""
    decays: bool = True
    float32: bool = False
    moves_as_score: bool = False

    @property
    def stacked(self) -> bool:
        """Whether axis 0 is the layer."""
        return self.path.startswith("layers/")

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Our axes, with `layers` in front where the parameter is stacked."""
        return (("layers",) if self.stacked else ()) + tuple(self.axes.split())

    @property
    def out(self) -> str:
        """Of a product, the axes that come out of it."""
        return self.axes.removeprefix(self.summed).strip()


def _grouped(axes: str) -> str:
    return f"({axes})" if " " in axes else axes


def _product(path: str, summed: str, out: str, hf_key: str, float32: bool = False) -> Parameter:
    """A matrix; HF has what comes out first."""
    hf_axes = f"{_grouped(out)} {_grouped(summed)}"
    return Parameter(path, f"{summed} {out}", hf_key, hf_axes, summed=summed, float32=float32)


def _norm(path: str, hf_key: str, only_if: str = "", axes: str = "norm") -> Parameter:
    return Parameter(path, axes, hf_key, axes, "norm", only_if, decays=False, float32=True)


def _bias(path: str, axes: str, hf_key: str, only_if: str) -> Parameter:
    return Parameter(path, axes, hf_key, _grouped(axes), "zeros", only_if, decays=False)


_LAYER = "model.layers.{}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

DECODER = (
    Parameter("embed", "vocab embed", "model.embed_tokens.weight", "vocab embed"),
    _norm("layers/attention_norm", _LAYER + "input_layernorm.weight"),
    _product("layers/q", "embed", "heads head_dim", _ATTENTION + "q_proj.weight"),
    _product("layers/k", "embed", "kv_heads head_dim", _ATTENTION + "k_proj.weight"),
    _product("layers/v", "embed", "kv_heads head_dim", _ATTENTION + "v_proj.weight"),
    _product("layers/o", "heads head_dim", "embed", _ATTENTION + "o_proj.weight"),
    _bias("layers/q_bias", "heads head_dim", _ATTENTION + "q_proj.bias", "qkv_bias"),
    _bias("layers/k_bias", "kv_heads head_dim", _ATTENTION + "k_proj.bias", "qkv_bias"),
    _bias("layers/v_bias", "kv_heads head_dim", _ATTENTION + "v_proj.bias", "qkv_bias"),
    _bias("layers/o_bias", "norm", _ATTENTION + "o_proj.bias", "attention_bias"),
    _norm("layers/q_norm", _ATTENTION + "q_norm.weight", "qk_norm", "head_dim"),
    _norm("layers/k_norm", _ATTENTION + "k_norm.weight", "qk_norm", "head_dim"),
    _norm("layers/attention_post_norm", "", "norms_after"),
    _norm("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight"),
    _product("layers/gate", "embed", "mlp", _MLP + "gate_proj.weight"),
    _product("layers/up", "embed", "mlp", _MLP + "up_proj.weight"),
    _product("layers/down", "mlp", "embed", _MLP + "down_proj.weight"),
    _bias("layers/gate_bias", "mlp", _MLP + "gate_proj.bias", "mlp_bias"),
    _bias("layers/up_bias", "mlp", _MLP + "up_proj.bias", "mlp_bias"),
    _bias("layers/down_bias", "norm", _MLP + "down_proj.bias", "mlp_bias"),
    _norm("layers/mlp_post_norm", "", "norms_after"),
    _norm("final_norm", "model.norm.weight"),
)
# Of `heads.py`: the reward head, and the language model's where that is not the embedding.
HEAD = _product("head", "embed", "attribute", "score.weight", float32=True)
LM_HEAD = _product("lm_head", "embed", "vocab", "lm_head.weight")
PARAMETERS = (*DECODER, HEAD, LM_HEAD)
# Of `rewards/ordinal.py`: a parameter of the objective. What it comes to is in `rmjax.json`.
THRESHOLDS = Parameter(
    "thresholds",
    "threshold attribute",
    init="zeros",
    decays=False,
    float32=True,
    moves_as_score=True,
)

_PEFT = "base_model.model."  # what PEFT's format puts in front of every key


def _adapters(row: Parameter) -> tuple[Parameter, Parameter]:
    """LoRA's A and B of a product; keys are PEFT's."""
    key = _PEFT + row.hf_key.removesuffix("weight")
    return (
        Parameter(
            f"{row.path}_lora_a",
            f"{row.summed} rank",
            f"{key}lora_A.weight",
            f"rank {_grouped(row.summed)}",
            "fan_in",
            float32=True,
        ),
        Parameter(
            f"{row.path}_lora_b",
            f"rank {row.out}",
            f"{key}lora_B.weight",
            f"{_grouped(row.out)} rank",
            "zeros",
            float32=True,
        ),
    )


# The products of the layers, and LoRA's A and B of each.
PRODUCTS = tuple(row for row in DECODER if row.stacked and row.summed)
ADAPTERS = {row.path: _adapters(row) for row in PRODUCTS}

_ADAPTER_ROWS = [row for pair in ADAPTERS.values() for row in pair]
TABLE = {row.path: row for row in (*PARAMETERS, THRESHOLDS, *_ADAPTER_ROWS)}


def flatten(tree: Params) -> dict[str, Any]:
    """`{"layers": {"q": x}}` to `{"layers/q": x}`."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        below = flatten(value) if isinstance(value, dict) else None
        leaves |= {name: value} if below is None else {f"{name}/{x}": y for x, y in below.items()}
    return leaves


def nest(leaves: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *above, name = path.split("/")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[name] = leaf
    return tree


def decoder_parameters(config: DecoderConfig, lora: LoraConfig = NO_LORA) -> Iterator[Parameter]:
    """The rows of the table that a decoder of this config has."""
    for row in DECODER:
        if not row.only_if or getattr(config, row.only_if):
            yield row
    yield from adapter_parameters(lora)


def peft_parameters(lora: LoraConfig, reward: bool) -> Iterator[Parameter]:
    """The rows of an adapter in PEFT's format: those of LoRA, and a reward model's head."""
    yield from adapter_parameters(lora)
    if reward:
        yield dataclasses.replace(HEAD, hf_key=_PEFT + HEAD.hf_key)


def adapter_parameters(lora: LoraConfig) -> Iterator[Parameter]:
    """The rows that LoRA adds."""
    for path, rows in ADAPTERS.items():
        if lora.adapts(path):
            yield from rows


def axis_sizes(config: DecoderConfig, lora: LoraConfig = NO_LORA) -> dict[str, int]:
    """The size of every axis name of a decoder's rows."""
    sizes = {
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    return sizes | ({"rank": lora.rank} if lora.rank else {})


def abstract_params(
    rows: Iterable[Parameter], sizes: dict[str, int], sharding: Sharding, dtype: Any = jnp.float32
) -> Params:
    """Shapes, dtypes and shardings of parameters, without any array.

    Args:
      rows: of the table.
      sizes: of their axes.
      sharding: the mesh.
      dtype: of those that are not float32 always.

    Raises:
      UserError: an axis does not divide over its mesh axes.
    """
    leaves = {}
    for row in rows:
        shape = tuple(sizes[axis] for axis in row.all_axes)
        placed = sharding.parameter(row.all_axes)
        check_divisible(f"parameter {row.path}", shape, placed)
        own = jnp.float32 if row.float32 else dtype
        leaves[row.path] = jax.ShapeDtypeStruct(shape, own, sharding=placed)
    return nest(leaves)


def initializer(row: Parameter, config: DecoderConfig) -> Callable[..., jax.Array]:
    """`init(key, shape, dtype)` for a parameter that no checkpoint gives."""
    if row.init == "norm" and not config.row.norm_offset:
        return jax.nn.initializers.ones
    if row.init in ("norm", "zeros"):
        return jax.nn.initializers.zeros
    if row.init == "fan_in":
        return _normal_by_fan_in
    return jax.nn.initializers.normal(config.initializer_range)


def _normal_by_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, of a variance that is one over all that is summed over: every axis but the last."""
    return jax.nn.initializers.normal(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)
