"""The decoder, or trunk: rows of tokens to hidden states. It knows nothing of what reads these.

B row, L token, P position, D embed, N heads, K kv_heads, H head_dim, F mlp
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from rmjax.models.attention.cached import Kept, Seen, attend_kept
from rmjax.models.attention.dispatch import AttentionPlan, attention, prepare
from rmjax.models.attention.mask import RESULT, Layout
from rmjax.models.decoder_config import DecoderConfig, LayerKind, Rope
from rmjax.models.inputs import Rows
from rmjax.models.layers import ACTIVATION, Layer
from rmjax.models.parameters import Params
from rmjax.models.parts import Parts, parts_of
from rmjax.models.rope import angles, inverse_frequencies, rotate

_save = jax.checkpoint_policies
_ATTENDED = _save.save_only_these_names(RESULT)
# What the backward pass finds stored; the rest it computes again. docs/benchmarks.md has what each
# costs and gives. The products with weights leave out attention, which a kernel may compute.
_POLICIES = {
    "none": _save.everything_saveable,
    "full": _save.nothing_saveable,
    "attention": _save.save_only_these_names("q", "k", "v", RESULT),
    "dots": _save.save_from_both_policies(_save.dots_with_no_batch_dims_saveable, _ATTENDED),
}
REMAT = tuple(_POLICIES)

Turns = tuple[Float32[Array, "B L H/2"], Float32[Array, "B L H/2"]]  # cosines and sines of RoPE
KeysValues = tuple[Float[Array, "... B L K H"], Float[Array, "... B L K H"]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stacked"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ByKind:
    """What is not the same for all kinds of layers, the kind in front of every array.

    So one loop goes over layers of all kinds with one attention in it, and takes what is a layer's
    by the number of its kind.
    """

    stacked: Any


def by_kind(config: DecoderConfig, make: Callable[[LayerKind], Any]) -> Any:
    """What `make` gives of a decoder's one kind of layer, or of each as `ByKind`."""
    made = [make(kind) for kind in config.kinds]
    return made[0] if len(made) == 1 else ByKind(jax.tree.map(lambda *x: jnp.stack(x), *made))


def _of_kind(value: Any, kind: Any) -> Any:
    """Of what may be `ByKind` that of one kind, or itself."""
    if not isinstance(value, ByKind):
        return value
    return jax.tree.map(lambda x: x[kind], value.stacked)


class Block(Layer):
    """One decoder layer.

    Attributes:
      keys_wanted: whether it gives the keys and values of its tokens, for those that follow.
    """

    keys_wanted: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        layout: Layout | AttentionPlan | Seen | ByKind,
        turns: Turns | ByKind,
        kept: Kept | None = None,
        parts: Parts | None = None,
        kind: Any = None,
    ) -> tuple[Float[Array, "B L D"], KeysValues | None]:
        """Returns the residual stream after this layer, and keys and values if they are wanted.

        Tokens attend to each other as `layout` says; or each is a row's new one and attends to what
        is kept of the layer. `kind` is the number of the layer's kind, where there are several.
        """
        config = self.config
        seen: Any = _of_kind(layout, kind)
        cos, sin = _of_kind(turns, kind)
        activation = ACTIVATION[config.hidden_act]
        # Kernels divide logits by the square root of head_dim: what is left of it, queries bring.
        logits_like = config.query_pre_attn_scalar
        longer = math.sqrt(config.head_dim / logits_like) if logits_like else 1.0

        def before(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
            y = self.norm(x, "layers/attention_norm")
            q = self.linear("bld,dnh->blnh", y, "layers/q", config.qkv_bias)
            k = self.linear("bld,dkh->blkh", y, "layers/k", config.qkv_bias)
            v = self.linear("bld,dkh->blkh", y, "layers/v", config.qkv_bias)
            if config.qk_norm:
                q, k = self.norm(q, "layers/q_norm"), self.norm(k, "layers/k_norm")
            turned = rotate(q, cos, sin) if longer == 1 else rotate(q, longer * cos, longer * sin)
            q = self.place(turned, "row", "length", "heads", "head_dim")
            k = self.place(rotate(k, cos, sin), "row", "length", "kv_heads", "head_dim")
            v = self.place(v, "row", "length", "kv_heads", "head_dim")
            return q, k, v

        def after(x: jax.Array, y: jax.Array) -> jax.Array:
            with jax.named_scope("attention"):
                y = self.linear("blnh,nhd->bld", y, "layers/o", config.attention_bias)
                if config.norms_after:
                    y = self.norm(y, "layers/attention_post_norm")
                x = self.place(x + y, "row", "length", "embed")
            with jax.named_scope("mlp"):
                y = self.norm(x, "layers/mlp_norm")
                gate = self.linear("bld,df->blf", y, "layers/gate", config.mlp_bias)
                up = self.linear("bld,df->blf", y, "layers/up", config.mlp_bias)
                y = self.place(activation(gate) * up, "row", "length", "mlp")
                y = self.linear("blf,fd->bld", y, "layers/down", config.mlp_bias)
                if config.norms_after:
                    y = self.norm(y, "layers/mlp_post_norm")
                return self.place(x + y, "row", "length", "embed")

        with jax.named_scope("attention"):
            q, k, v = parts.each(before, x, cos, sin) if parts else before(x, cos, sin)
            q, k, v = map(checkpoint_name, (q, k, v), ("q", "k", "v"))
            if isinstance(seen, Seen):
                assert kept is not None
                y = attend_kept(q, k, v, kept, seen, config.attn_logit_softcapping)
            else:
                y = attention(q, k, v, seen, config.attn_logit_softcapping)
        x = parts.each(after, x, y) if parts else after(x, y)
        return x, (k, v) if self.keys_wanted else None


class Decoder(Layer):
    """Rows of tokens to hidden states: embed, layers, final norm."""

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
        in_parts = self.options.parts and not self.is_initializing()  # whose loops make no weights
        parts = parts_of(rows.segment_ids) if in_parts else None
        layout = self._plan(rows)
        return self._run(rows.tokens, rows.positions, layout, wanted=positions, parts=parts)[0]

    def keys_values(self, rows: Rows) -> KeysValues:
        """The keys, rotated, and the values of tokens, with the layers in front."""
        return self._run(rows.tokens, rows.positions, self._plan(rows), keys_wanted=True)[1]

    def extend(
        self,
        tokens: Int32[Array, "B 1"],
        positions: Int32[Array, "B 1"],
        kept: Kept | Sequence[Kept],
        seen: Seen | ByKind,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KeysValues | Sequence[KeysValues]]:
        """The hidden states of one new token a row, behind tokens whose keys and values are kept.

        Args:
          tokens: the new ones.
          positions: of each in its own sample.
          kept: keys and values of the tokens before, with the layers in front, or layer by layer.
          seen: which of these each row sees; see `by_kind`.
          layers: the parameters of each layer by itself, if `kept` is so; see `split_layers`. The
            layers are then no loop.

        Returns:
          The states, as `__call__` gives them; keys and values of the new tokens, as `kept` is.
        """
        return self._run(tokens, positions, seen, kept, keys_wanted=True, apart=layers)

    def _plan(self, rows: Rows) -> Layout | AttentionPlan | ByKind:
        layout = Layout(rows.segment_ids, rows.masked_start, rows.masked_end)
        if self.is_initializing():  # with rows that are shorter than any kernel wants
            return layout
        attention, sharding = self.options.attention, self.options.sharding
        window = self.config.window_within(rows.segment_ids.shape[1])
        if window is None:
            return prepare(attention, layout, sharding)

        def plan(kind: LayerKind) -> Layout | AttentionPlan:
            mine = layout.windowed(rows.positions, kind.window)
            return prepare(attention, mine, sharding, window)

        return by_kind(self.config, plan)

    @nn.compact
    def _run(
        self,
        tokens: Int32[Array, "B L"],
        token_positions: Int32[Array, "B L"],
        layout: Layout | AttentionPlan | Seen | ByKind,
        kept: Any = None,
        *,
        wanted: Int32[Array, "B P"] | None = None,
        keys_wanted: bool = False,
        parts: Parts | None = None,
        apart: Sequence[Params] | None = None,
    ) -> Any:
        config, options = self.config, self.options
        # Rows are looked up before they are rounded: the gradient sums many tokens' in float32.
        x = self.weight("embed")[tokens].astype(options.dtype)
        if config.row.scaled_embeddings:  # rounded first, as transformers does
            x = x * jnp.asarray(math.sqrt(config.hidden_size), x.dtype)
        x = self.place(x, "row", "length", "embed")

        def turns_of(rope: Rope) -> Turns:
            return angles(token_positions, inverse_frequencies(rope, config.head_dim))

        ropes = {kind.rope for kind in config.kinds}
        turns = (
            turns_of(*ropes)
            if len(ropes) == 1
            else by_kind(config, lambda kind: turns_of(kind.rope))
        )
        several = len(config.kinds) > 1
        kinds = config.kind_of_layers if several else [None] * config.num_hidden_layers

        if apart is None:
            scanned = jnp.asarray(kinds, jnp.int32) if several else None
            x, keys = self._layers(keys_wanted)(x, layout, turns, kept, parts, scanned)
        else:
            block, keys = Block(config, options, self.lora, keys_wanted, parent=None), []
            for layer, of_layer, kind in zip(apart, kept, kinds, strict=True):
                made: Any = block.apply({"params": layer}, x, layout, turns, of_layer, None, kind)
                x, new = made
                keys.append(new)

        with jax.named_scope("head"):
            if wanted is not None:
                x = jnp.take_along_axis(x, wanted[:, :, None], axis=1)
            return self.norm(x, "final_norm"), keys

    def _layers(self, keys_wanted: bool) -> Any:
        """All layers as one loop."""
        config, options = self.config, self.options
        block = Block
        if options.remat != "none":
            block = nn.remat(Block, policy=_POLICIES[options.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        return layers(config, options, self.lora, keys_wanted, name="layers")


def split_layers(stacked: Any, count: int) -> list[Any]:
    """Of arrays with the layers in front, those of each of `count` layers.

    XLA's CPU backend copies a layer's weights, and what is kept of it, each time a loop over the
    layers comes to it. Taken apart before a loop over tokens they are copied once.
    """
    return [jax.tree.map(lambda x, i=layer: x[i], stacked) for layer in range(count)]
