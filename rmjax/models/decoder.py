"""The decoder, or trunk: rows of tokens to hidden states. It knows nothing of what reads these.

B row, L token, P position, D embed, N heads, K kv_heads, H head_dim, F mlp
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from rmjax.models.attention.dispatch import AttentionPlan, attention, prepare
from rmjax.models.attention.mask import RESULT, Layout
from rmjax.models.inputs import Rows
from rmjax.models.layers import Layer, rms_norm
from rmjax.models.rope import angles, inverse_frequencies, rotate

_save = jax.checkpoint_policies
_ATTENDED = _save.save_only_these_names(RESULT)
# What the backward pass finds stored; the rest it computes again. docs/appendix.md has what each
# costs and gives. The products with weights leave out attention, which a kernel may compute.
_POLICIES = {
    "none": _save.everything_saveable,
    "full": _save.nothing_saveable,
    "attention": _save.save_only_these_names("q", "k", "v", RESULT),
    "dots": _save.save_from_both_policies(_save.dots_with_no_batch_dims_saveable, _ATTENDED),
}
REMAT = tuple(_POLICIES)


class Block(Layer):
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
            y = rms_norm(x, self.weight("layers/attention_norm"), config.rms_norm_eps)
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
            y = rms_norm(x, self.weight("layers/mlp_norm"), config.rms_norm_eps)
            gate = self.linear("bld,df->blf", y, "layers/gate", config.mlp_bias)
            up = self.linear("bld,df->blf", y, "layers/up", config.mlp_bias)
            y = self.place(jax.nn.silu(gate) * up, "row", "length", "mlp")
            y = self.linear("blf,fd->bld", y, "layers/down", config.mlp_bias)
            x = self.place(x + y, "row", "length", "embed")
        return x, None


class Decoder(Layer):
    """Rows of tokens to hidden states: embed, layers, final norm."""

    @nn.compact
    def __call__(
        self, rows: Rows, positions: Int32[Array, "B P"] | None = None
    ) -> Float[Array, "B P D"]:
        """The hidden states of tokens, after the final norm.

        Args:
          rows: the tokens, and which of them see which.
          positions: in the row, of the tokens that are wanted; None for all of them.

        Returns:
          Their states, in the dtype of the computation; arbitrary finite numbers in padding.
        """
        config, options = self.config, self.options
        # Rows are looked up before they are rounded: the gradient sums many tokens' in float32.
        x = self.weight("embed")[rows.tokens].astype(options.dtype)
        x = self.place(x, "row", "length", "embed")
        cos, sin = angles(rows.positions, inverse_frequencies(config.rope, config.head_dim))

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
        x, _ = layers(config, options, self.lora, name="layers")(x, layout, cos, sin)

        with jax.named_scope("head"):
            if positions is not None:
                x = jnp.take_along_axis(x, positions[:, :, None], axis=1)
            return rms_norm(x, self.weight("final_norm"), config.rms_norm_eps)
