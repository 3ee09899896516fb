"""A Llama with a linear head that reads one vector of attributes at the end of each sample.

B row, L token, S sample slot, D embed, N heads, K kv_heads, H head_dim, F mlp, A attribute
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from rmjax.models.attention.dispatch import AttentionPlan, attention, prepare
from rmjax.models.attention.mask import Layout
from rmjax.models.config import LlamaConfig
from rmjax.models.inputs import Rows
from rmjax.models.lora import NO_LORA, LoraConfig, drop
from rmjax.models.parameters import (
    ADAPTERS,
    PARAMETERS,
    THRESHOLDS,
    Params,
    axis_sizes,
    initializer,
)
from rmjax.models.quantization import product
from rmjax.models.rope import angles, dynamic_frequencies, inverse_frequencies, rotate
from rmjax.runtime.sharding import Sharding

_save = jax.checkpoint_policies
# What `attention.attention` calls its result, wherever it is made.
_ATTENDED = _save.save_only_these_names("attended")
# What the backward pass finds stored; the rest it computes again. docs/performance.md has what each
# costs and gives. The products with weights leave out attention, which a kernel may compute.
_POLICIES = {
    "none": _save.everything_saveable,
    "full": _save.nothing_saveable,
    "attention": _save.save_only_these_names("q", "k", "v", "attended"),
    "dots": _save.save_from_both_policies(_save.dots_with_no_batch_dims_saveable, _ATTENDED),
}
REMAT = tuple(_POLICIES)
_ROWS = {row.path: row for row in PARAMETERS} | {
    row.path: row for pair in ADAPTERS.values() for row in pair
}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is computed; none of it changes what the model is.

    Attributes:
      sharding: the mesh and its tables.
      dtype: of activations and matrix products; head, norms' statistics and softmax are float32.
      remat: what is stored for the backward pass: with `none` every activation, with `dots` the
        products with weights and attention's result, with `attention` the latter and what it is
        made of, with `full` only each layer's input.
      attention: the implementation, a key of `kernels.KERNELS`; see `kernels.choose`.
    """

    sharding: Sharding
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"


def _rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normal * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def read_head(
    features: Float32[Array, "B S D"], head: Float[Array, "D A"]
) -> Float32[Array, "B S A"]:
    """The head's scores of what it reads."""
    # Full float32: accelerators otherwise round the factors to bfloat16 or tf32.
    return jnp.einsum(
        "bsd,da->bsa", features, head.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _as_matrices(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """What `jnp.einsum` gives where the axes summed over end `x` and begin `weight`.

    As one product of two matrices, since XLA's CPU backend computes the gradients of the other form
    at a third of the speed. On a mesh, merging axes might cost communication.
    """
    left, right = equation.split("->")[0].split(",")
    summed = len(set(left) & set(right))
    size = math.prod(weight.shape[:summed])
    y = x.reshape(-1, size) @ weight.reshape(size, -1)
    return y.reshape(*x.shape[: x.ndim - summed], *weight.shape[summed:])


class _Table(nn.Module):
    """A module whose parameters are rows of the table."""

    config: LlamaConfig
    options: ModelOptions
    attributes: int
    lora: LoraConfig = NO_LORA

    def weight(self, path: str) -> jax.Array:
        row = _ROWS[path]
        sizes = axis_sizes(self.config, self.attributes, self.lora)
        shape = tuple(sizes[axis] for axis in row.axes.split())
        name = path.removeprefix("layers/")
        return self.param(name, initializer(row, self.config), shape, jnp.float32)

    def linear(self, equation: str, x: jax.Array, path: str, bias: bool = False) -> jax.Array:
        weight = self.weight(path)
        if isinstance(weight, jax.Array):
            y = self.multiply(equation, x, weight)
        else:  # in 8 bits
            y = product(equation, x, weight, self.options.sharding.mesh)
        if self.lora.adapts(path):
            y += self.adapter(equation, x, path)
        if not bias:
            return y
        return y + jnp.broadcast_to(self.weight(f"{path}_bias").astype(x.dtype), y.shape)

    def multiply(self, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        multiply = jnp.einsum if self.options.sharding.mesh.size > 1 else _as_matrices
        return multiply(equation, x, weight.astype(x.dtype))

    def adapter(self, equation: str, x: jax.Array, path: str) -> jax.Array:
        """What LoRA adds to the product of `equation`, by way of `rank` numbers a token."""
        factors, result = equation.split("->")
        left, right = factors.split(",")
        summed = "".join(axis for axis in right if axis in left)
        if self.lora.dropout and self.has_rng("dropout"):  # in training only
            x = drop(x, self.lora.dropout, self.make_rng("dropout"))
        z = self.multiply(f"{left},{summed}r->blr", x, self.weight(f"{path}_lora_a"))
        z = self.place(self.lora.scale * z, "row", "length", "rank")
        out = right.removeprefix(summed)
        return self.multiply(f"blr,r{out}->{result}", z, self.weight(f"{path}_lora_b"))

    def place(self, x: jax.Array, *axes: str) -> jax.Array:
        return self.options.sharding.constrain(x, axes)


class Block(_Table):
    """One decoder layer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        layout: Layout | AttentionPlan,
        cos: jax.Array,
        sin: jax.Array,
    ) -> tuple[Float[Array, "B L D"], None]:
        """Returns the residual stream after this layer, as `nn.scan` wants its carry."""
        config = self.config
        with jax.named_scope("attention"):
            y = _rms_norm(x, self.weight("layers/attention_norm"), config.rms_norm_eps)
            bias = config.attention_bias
            q = self.linear("bld,dnh->blnh", y, "layers/q", bias)
            k = self.linear("bld,dkh->blkh", y, "layers/k", bias)
            v = self.linear("bld,dkh->blkh", y, "layers/v", bias)
            q = self.place(rotate(q, cos, sin), "row", "length", "heads", "head_dim")
            k = self.place(rotate(k, cos, sin), "row", "length", "kv_heads", "head_dim")
            v = self.place(v, "row", "length", "kv_heads", "head_dim")
            q, k, v = map(checkpoint_name, (q, k, v), ("q", "k", "v"))
            y = self.linear("blnh,nhd->bld", attention(q, k, v, layout), "layers/o", bias)
            x = self.place(x + y, "row", "length", "embed")
        with jax.named_scope("mlp"):
            y = _rms_norm(x, self.weight("layers/mlp_norm"), config.rms_norm_eps)
            gate = self.linear("bld,df->blf", y, "layers/gate", config.mlp_bias)
            up = self.linear("bld,df->blf", y, "layers/up", config.mlp_bias)
            y = self.place(jax.nn.silu(gate) * up, "row", "length", "mlp")
            y = self.linear("blf,fd->bld", y, "layers/down", config.mlp_bias)
            x = self.place(x + y, "row", "length", "embed")
        return x, None


class RewardModel(_Table):
    """Rows of tokens to attributes: embed, layers, norm, head.

    Attributes:
      thresholds: of each attribute, where the objective is ordinal. They are parameters of the
        loss alone: scores are the head's numbers with them as without.
    """

    thresholds: int = 0

    @nn.compact
    def __call__(self, rows: Rows, features: bool = False) -> Float32[Array, "B S A"]:
        """Scores of every sample slot; slots without a sample hold arbitrary finite numbers.

        With `features`, what the head reads instead, [B, S, D].
        """
        config, options = self.config, self.options
        if self.thresholds and self.is_initializing():
            shape = (self.thresholds, self.attributes)
            self.param(THRESHOLDS.path, initializer(THRESHOLDS, config), shape, jnp.float32)
        # Rows are looked up before they are rounded: the gradient sums many tokens' in float32.
        x = self.weight("embed")[rows.tokens].astype(options.dtype)
        x = self.place(x, "row", "length", "embed")
        cos, sin = angles(rows.positions, self._frequencies(rows))

        block = Block
        if options.remat != "none":
            block = nn.remat(Block, policy=_POLICIES[options.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        layout: Any = Layout(rows.segment_ids, rows.masked_start, rows.masked_end)
        if not self.is_initializing():  # whose rows are shorter than any kernel wants
            layout = prepare(options.attention, layout, options.sharding)
        stack = layers(config, options, self.attributes, self.lora, name="layers")
        x, _ = stack(x, layout, cos, sin)

        with jax.named_scope("head"):
            last = jnp.take_along_axis(x, rows.last_token_index[:, :, None], axis=1)
            last = _rms_norm(last, self.weight("final_norm"), config.rms_norm_eps)
            last = last.astype(jnp.float32)
            return last if features else read_head(last, self.weight("head"))

    def _frequencies(self, rows: Rows) -> Any:
        """With dynamic RoPE they go by the sample's length: there each sample is its own group."""
        config = self.config
        if config.rope.type != "dynamic":
            return inverse_frequencies(config.rope, config.head_dim)
        counts = jnp.take_along_axis(rows.positions, rows.last_token_index, axis=1) + 1
        lengths = jnp.take_along_axis(counts, jnp.maximum(rows.segment_ids - 1, 0), axis=1)
        return dynamic_frequencies(
            config.rope, config.head_dim, config.max_position_embeddings, lengths
        )


def compute_dtype(name: str) -> Any:
    """`auto` is bfloat16 on accelerators and float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def apply(
    model: RewardModel, params: Params, rows: Rows, dropout: jax.Array | None = None
) -> Float32[Array, "B S A"]:
    """Scores of every slot of every row, traced into whatever is being compiled.

    Args:
      model: what to compute.
      params: its parameters.
      rows: the samples.
      dropout: the key of LoRA's dropout; None for none, as in scoring.
    """
    rngs = {} if dropout is None else {"dropout": dropout}
    scores: Any = model.apply({"params": params}, rows, rngs=rngs)
    return scores
