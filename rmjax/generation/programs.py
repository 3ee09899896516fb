"""The compiled functions: prompts into the cache, and tokens out of it.

The host decides between calls which row samples what; see `schedule`. What it says of rows it says
anew in every call, so that the cache alone stays on the devices.

G group, R row of a group, K kv_heads, H head_dim, P place of a prompt's token, W slot of a row's
own token, C token of a chunk, B and L rows of prompts
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from rmjax.generation.choice import Rule, choose, uniform
from rmjax.models.attention.cached import KEPT_AXES, Kept, Seen
from rmjax.models.attention.dispatch import platform
from rmjax.models.decoder import KeysValues, by_kind, split_layers
from rmjax.models.decoder_config import LayerKind
from rmjax.models.inputs import Rows
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.runtime.sharding import Sharding, check_divisible

CHUNK = 32  # tokens that are sampled before the host looks
TOKEN_LOOP = "tokens"  # the scope of the loop over them, in the program's text


class RowStates(NamedTuple):
    """What each row does next, [G, R].

    Attributes:
      token: that is read next.
      position: of that token in its sample, prompt and all.
      count: tokens that were sampled.
      limit: tokens that may be sampled.
      begun: the step in which the row's first own token was read.
      prompt_start: where its prompt's kept tokens begin in the group's places.
      prompt_end: where they end.
      prompt_key: what the noise depends on, with the seed, sample and `count`.
      sample: number of the sample among those of its prompt.
      running: whether the row samples at all.
    """

    token: Int32[Array, "G R"]
    position: Int32[Array, "G R"]
    count: Int32[Array, "G R"]
    limit: Int32[Array, "G R"]
    begun: Int32[Array, "G R"]
    prompt_start: Int32[Array, "G R"]
    prompt_end: Int32[Array, "G R"]
    prompt_key: UInt32[Array, "G R"]
    sample: Int32[Array, "G R"]
    running: Bool[Array, "G R"]


ROW_STATES_AXES = RowStates._make([("row", "member")] * len(RowStates._fields))


class Sampled(NamedTuple):
    """What a chunk sampled, whole on every process; -1 and 0 where a row had ended.

    Attributes:
      tokens: int32 [C G R].
      log_probabilities: float32 [C G R].
    """

    tokens: Any
    log_probabilities: Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a cache.

    Attributes:
      groups: of rows that share prompts.
      members: rows of a group.
      places: for the tokens of a group's prompts.
      slots: for a row's own tokens.
    """

    groups: int
    members: int
    places: int
    slots: int


Cache = Kept | list[Kept]  # with the layers in front, or layer by layer; see `split_layers`


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of a model.

    Attributes:
      prepare: params -> params as `sample` takes them: on CPUs the layers one by one, a copy.
      make_cache: zeros of a `Shape`.
      insert: (params, cache, rows, source [G, P]) -> the cache with the keys and values of the
        tokens of `rows`: place p of group g gets those of token `source[g, p]`, counted through the
        rows; -1 leaves it as it is. The cache is donated.
      move: (cache, source [W]) -> a cache in which slot w has what slot `source[w]` had.
      sample: (prepared params, cache, states, step, seed, ends, rule) -> cache, `Sampled`, a chunk
        of tokens. Tokens that are read in `step` go to the slot step % W. A row ends with one of
        `ends` [E], or at its limit. The cache is donated.
    """

    prepare: Callable[[Params], Params]
    make_cache: Callable[[Shape], Cache]
    insert: Callable[..., Cache]
    move: Callable[..., Cache]
    sample: Callable[..., tuple[Cache, Sampled]]


def make_programs(model: Model) -> Programs:
    """The functions that sample from a model with a language-model head."""
    sharding, depth = model.options.sharding, model.config.num_hidden_layers
    apart = platform(sharding) == "cpu"
    whole = Kept(*(sharding.activation(axes) for axes in KEPT_AXES))
    one = Kept(*(sharding.activation(axes[1:]) for axes in KEPT_AXES))
    placed: Any = [one] * depth if apart else whole

    def prepare(params: Params) -> Params:
        if not apart:
            return params
        return {**params, "layers": split(params["layers"])}

    def make_cache(shape: Shape) -> Cache:
        shapes = cache_shapes(model, shape)

        def zeros() -> Cache:
            made = jax.tree.map(lambda wanted: jnp.zeros(wanted.shape, wanted.dtype), shapes)
            return split_layers(made, depth) if apart else made

        return jax.jit(zeros, out_shardings=placed)()

    def insert(params: Params, cache: Cache, rows: Rows, source: jax.Array) -> Cache:
        new: Any = model.decoder.apply({"params": params}, rows, method="keys_values")
        if apart:
            layers = zip(cache, split_layers(new, depth), strict=True)
            return [_insert(kept, keys_values, source) for kept, keys_values in layers]
        return jax.lax.map(lambda layer: _insert(layer[0], layer[1], source), (cache, new))

    def move(cache: Cache, source: jax.Array) -> Cache:
        def of_layers(kept: Kept) -> Kept:
            return kept._replace(
                own_keys=jnp.take(kept.own_keys, source, axis=-1),
                own_values=jnp.take(kept.own_values, source, axis=-2),
            )

        return [of_layers(kept) for kept in cache] if apart else of_layers(cache)  # pyright: ignore

    options = compiler_options(sharding.mesh)
    split: Any = jax.jit(lambda layers: split_layers(layers, depth), compiler_options=options)
    sampled = Sampled(sharding.replicated, sharding.replicated)
    return Programs(
        prepare=prepare,
        make_cache=make_cache,
        insert=jax.jit(insert, donate_argnums=1, out_shardings=placed, compiler_options=options),
        move=jax.jit(move, out_shardings=placed, compiler_options=options),
        sample=jax.jit(
            functools.partial(_sample, model),
            donate_argnums=1,
            out_shardings=(placed, sampled),
            compiler_options=options,
        ),
    )


def cache_shapes(model: Model, shape: Shape) -> Kept:
    """Shapes, dtypes and shardings of a cache with the layers in front, without any array.

    Raises:
      UserError: it does not divide over the mesh.
    """
    config, sharding = model.config, model.options.sharding
    sizes = (config.num_hidden_layers, shape.groups, config.num_key_value_heads)
    head, members, places, slots = config.head_dim, shape.members, shape.places, shape.slots
    shapes = Kept(
        (*sizes, head, places),
        (*sizes, places, head),
        (*sizes, members, head, slots),
        (*sizes, members, slots, head),
    )
    found = []
    for name, size, axes in zip(Kept._fields, shapes, KEPT_AXES):
        placed = sharding.activation(axes)
        check_divisible(f"cache {name}", size, placed)
        found.append(jax.ShapeDtypeStruct(size, model.options.dtype, sharding=placed))
    return Kept(*found)


def _insert(kept: Kept, new: tuple[jax.Array, jax.Array], source: jax.Array) -> Kept:
    """What is kept of one layer, with keys and values [B, L, K, H] at the places of a source."""

    def replace(old: jax.Array, new: jax.Array, order: str) -> jax.Array:
        flat = rearrange(new.astype(old.dtype), "B L K H -> (B L) K H")
        taken = rearrange(jnp.take(flat, jnp.maximum(source, 0), axis=0), f"G P K H -> {order}")
        changed = jnp.broadcast_to(
            (source >= 0)[:, :, None, None], (*source.shape, *flat.shape[1:])
        )
        return jnp.where(rearrange(changed, f"G P K H -> {order}"), taken, old)

    keys, values = new
    return kept._replace(
        prompt_keys=replace(kept.prompt_keys, keys, "G K H P"),
        prompt_values=replace(kept.prompt_values, values, "G K P H"),
    )


# ---- a chunk of tokens --------------------------------------------------------------------------


class _Loop(NamedTuple):
    """What one token hands on to the next; the first axis of `sampled` is the token's number."""

    number: jax.Array
    cache: Cache
    token: jax.Array
    count: jax.Array
    running: jax.Array
    sampled: Sampled


def _sample(
    model: Model,
    params: Params,
    cache: Cache,
    states: RowStates,
    step: jax.Array,
    seed: jax.Array,
    ends: jax.Array,
    rule: Rule,
) -> tuple[Cache, Sampled]:
    """See `Programs`."""
    apart = isinstance(cache, list)
    layers = params["layers"] if apart else None
    others = {name: leaf for name, leaf in params.items() if name != "layers" or not apart}
    kept = cache[0] if apart else cache
    places, slots = kept.prompt_keys.shape[-1], kept.own_keys.shape[-1]
    keys = _row_keys(seed, states)
    place = jnp.arange(places)[None, None]
    from_start = place >= states.prompt_start[:, :, None]
    seen_prompt = from_start & (place < states.prompt_end[:, :, None])

    def extend(now: _Loop) -> _Loop:
        read = step + now.number  # the step in which tokens are read now
        age = ((read - jnp.arange(slots)) % slots)[None, None]
        seen_own = (age > 0) & (age <= (read - states.begun)[:, :, None])

        def seen(kind: LayerKind) -> Seen:
            if kind.window is None:
                return Seen(seen_prompt, seen_own)
            # From the token that is read to that of a place, both counted in the sample.
            back = (states.position + now.number + states.prompt_start)[:, :, None] - place
            return Seen(seen_prompt & (back < kind.window), seen_own & (age < kind.window))

        hidden, new = model.decoder.apply(  # pyright: ignore[reportGeneralTypeIssues]
            {"params": others},
            now.token.reshape(-1, 1),
            (states.position + now.number).reshape(-1, 1),
            now.cache,
            by_kind(model.config, seen),
            layers,
            method="extend",
        )
        logits = model.head(params, hidden)[:, 0]
        logits = _for_drawing(logits, model.options.sharding)
        noise = uniform(keys, now.count.reshape(-1))
        token, log_probability = (x.reshape(now.token.shape) for x in choose(logits, noise, rule))
        count = now.count + now.running.astype(jnp.int32)
        ended = (token[:, :, None] == ends[None, None]).any(-1) | (count >= states.limit)
        told = Sampled(
            jnp.where(now.running, token, -1), jnp.where(now.running, log_probability, 0)
        )
        sampled = Sampled(*(all_.at[now.number].set(x) for all_, x in zip(now.sampled, told)))
        # It depends on what was read of the cache, so that this is over before anything is written:
        # otherwise the compiler has the cache copied.
        slot = jnp.where(jnp.isfinite(hidden[0, 0, 0]), read % slots, 0)
        written: Any = (
            [
                _write(kept, pair, slot)  # pyright: ignore[reportArgumentType]
                for kept, pair in zip(now.cache, new, strict=True)
            ]
            if apart
            else _as_named(_write(now.cache, new, slot))  # pyright: ignore[reportArgumentType]
        )
        return _Loop(now.number + 1, written, token, count, now.running & ~ended, sampled)

    shape = (CHUNK, *states.token.shape)
    start = _Loop(
        jnp.zeros((), jnp.int32),
        cache,
        states.token,
        states.count,
        states.running,
        Sampled(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)),
    )
    with jax.named_scope(TOKEN_LOOP):
        end = jax.lax.while_loop(
            lambda now: (now.number < CHUNK) & now.running.any(), extend, start
        )
    return end.cache, end.sampled


def _for_drawing(logits: Float32[Array, "GR V"], sharding: Sharding) -> jax.Array:
    """The same logits, each row's whole on one device, and the rows over all devices.

    The product gives each device a part of the vocabulary. Without saying so first, the compiler
    gathers the matrix for every token instead. Rows that do not divide over all devices are drawn
    by each device of `tensor` alike.
    """
    logits = sharding.constrain(logits, ("row", "vocab"))
    parts = sharding.row_shards * sharding.mesh.shape["tensor"]
    return sharding.constrain(logits, ("row" if len(logits) % parts else "drawn", "choice"))


def _row_keys(seed: jax.Array, states: RowStates) -> UInt32[Array, "GR 2"]:
    """Of each row, by the seed, its prompt's key and the number of its sample."""

    def one(prompt: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        folded = jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
        return jax.random.key_data(folded)

    return jax.vmap(one)(states.prompt_key.reshape(-1), states.sample.reshape(-1))


def _write(kept: Kept, new: KeysValues, slot: jax.Array) -> Kept:
    """What is kept, with keys and values of each row's new token in a slot."""
    groups = kept.prompt_keys.shape[-4]
    keys, values = (x.astype(kept.own_keys.dtype) for x in new)
    update = jax.lax.dynamic_update_slice_in_dim
    keys = rearrange(keys, "... (G R) 1 K H -> ... G K R H 1", G=groups)
    values = rearrange(values, "... (G R) 1 K H -> ... G K R 1 H", G=groups)
    return kept._replace(
        own_keys=update(kept.own_keys, keys, slot, keys.ndim - 1),
        own_values=update(kept.own_values, values, slot, values.ndim - 2),
    )


def _as_named(kept: Kept) -> Kept:
    """The same in memory as its axes are named, the layers in front.

    The TPUs' compiler would turn the rows' own keys and values so that writing a slot costs least:
    it would copy all of them twice a chunk, and read each layer's in strides.
    """

    def pinned(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return kept._replace(own_keys=pinned(kept.own_keys), own_values=pinned(kept.own_values))
