"""The compiled functions: prompts into the cache, and tokens out of it.

The host decides between calls which row samples what; see `schedule`. What it says of rows it says
anew in every call, so that the cache alone stays on the devices.

G group, R row of a group, K kv_heads, H head_dim, P place of a prompt's token, W slot of a row's
own token, C token of a chunk, B and L rows of prompts
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from rmjax.generation.choice import Rule, choose, uniform
from rmjax.models.attention.cached import KEPT_AXES, Kept, Seen
from rmjax.models.inputs import Rows
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.runtime.sharding import check_divisible

CHUNK = 32  # tokens that are sampled before the host looks


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
    """What a chunk sampled, whole on every process; -1 and 0 where a row had ended."""

    tokens: Int32[Array, "C G R"]
    log_probabilities: Float32[Array, "C G R"]


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


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of a model.

    Attributes:
      make_cache: zeros of a `Shape`.
      insert: (params, kept, rows, source [G, P]) -> kept with the keys and values of the tokens of
        `rows`: place p of group g gets those of token `source[g, p]`, counted through the rows; -1
        leaves it as it is. `kept` is donated.
      move: (kept, source [W]) -> kept in which slot w has what slot `source[w]` had.
      sample: (params, kept, states, step, seed, ends, rule) -> kept, `Sampled`, a chunk of tokens.
        Tokens that are read in `step` go to the slot step % W. A row ends with one of `ends` [E],
        or at its limit. `kept` is donated.
    """

    make_cache: Callable[[Shape], Kept]
    insert: Callable[..., Kept]
    move: Callable[..., Kept]
    sample: Callable[..., tuple[Kept, Sampled]]


def make_programs(model: Model) -> Programs:
    """The functions that sample from a model with a language-model head."""
    sharding = model.options.sharding
    options = compiler_options(sharding.mesh)
    placed = Kept(*(sharding.activation(axes) for axes in KEPT_AXES))

    def insert(params: Params, kept: Kept, rows: Rows, source: jax.Array) -> Kept:
        new: Any = model.decoder.apply({"params": params}, rows, method="keys_values")
        index = jnp.maximum(source, 0)

        def layer(both: tuple[Any, Any, Any, Any]) -> tuple[jax.Array, jax.Array]:
            keys, values, new_keys, new_values = both
            return (
                _replace(keys, new_keys, index, source, "G P K H -> G K H P"),
                _replace(values, new_values, index, source, "G P K H -> G K P H"),
            )

        keys, values = jax.lax.map(layer, (kept.prompt_keys, kept.prompt_values, *new))
        return kept._replace(prompt_keys=keys, prompt_values=values)

    def move(kept: Kept, source: jax.Array) -> Kept:
        return kept._replace(
            own_keys=jnp.take(kept.own_keys, source, axis=5),
            own_values=jnp.take(kept.own_values, source, axis=4),
        )

    def sample(
        params: Params,
        kept: Kept,
        states: RowStates,
        step: jax.Array,
        seed: jax.Array,
        ends: jax.Array,
        rule: Rule,
    ) -> tuple[Kept, Sampled]:
        return _sample(model, params, kept, states, step, seed, ends, rule)

    whole = sharding.replicated
    return Programs(
        make_cache=lambda shape: _zeros(model, shape),
        insert=jax.jit(insert, donate_argnums=1, out_shardings=placed, compiler_options=options),
        move=jax.jit(move, out_shardings=placed, compiler_options=options),
        sample=jax.jit(
            sample,
            donate_argnums=1,
            out_shardings=(placed, Sampled(whole, whole)),
            compiler_options=options,
        ),
    )


def cache_shapes(model: Model, shape: Shape) -> Kept:
    """Shapes, dtypes and shardings of a cache, without any array.

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


def _zeros(model: Model, shape: Shape) -> Kept:
    shapes = cache_shapes(model, shape)

    def make() -> Kept:
        return jax.tree.map(lambda wanted: jnp.zeros(wanted.shape, wanted.dtype), shapes)

    return jax.jit(make, out_shardings=jax.tree.map(lambda wanted: wanted.sharding, shapes))()


def _replace(
    old: jax.Array, new: Float[Array, "B L K H"], index: jax.Array, source: jax.Array, order: str
) -> jax.Array:
    taken = jnp.take(rearrange(new, "B L K H -> (B L) K H"), index, axis=0)
    changed = rearrange(jnp.broadcast_to((source >= 0)[:, :, None, None], taken.shape), order)
    return jnp.where(changed, rearrange(taken, order).astype(old.dtype), old)


# ---- a chunk of tokens --------------------------------------------------------------------------


class _Loop(NamedTuple):
    """What one token hands on to the next; the first axis of `sampled` is the token's number."""

    number: jax.Array
    own_keys: jax.Array
    own_values: jax.Array
    token: jax.Array
    count: jax.Array
    running: jax.Array
    sampled: Sampled


def _sample(
    model: Model,
    params: Params,
    kept: Kept,
    states: RowStates,
    step: jax.Array,
    seed: jax.Array,
    ends: jax.Array,
    rule: Rule,
) -> tuple[Kept, Sampled]:
    places, slots = kept.prompt_keys.shape[-1], kept.own_keys.shape[-1]
    keys = _row_keys(seed, states)
    place = jnp.arange(places)[None, None]
    seen_prompt = (states.prompt_start[:, :, None] <= place) & (
        place < states.prompt_end[:, :, None]
    )

    def extend(now: _Loop) -> _Loop:
        read = step + now.number  # the step in which tokens are read now
        age = ((read - jnp.arange(slots)) % slots)[None, None]
        seen_own = (age > 0) & (age <= (read - states.begun)[:, :, None])
        layers = kept._replace(own_keys=now.own_keys, own_values=now.own_values)
        position = states.position + now.number
        hidden, (new_keys, new_values) = model.decoder.apply(  # pyright: ignore[reportGeneralTypeIssues]
            {"params": params},
            now.token.reshape(-1, 1),
            position.reshape(-1, 1),
            layers,
            Seen(seen_prompt, seen_own),
            method="extend",
        )
        logits = model.options.sharding.constrain(
            model.head(params, hidden)[:, 0], ("row", "choice")
        )
        noise = uniform(keys, now.count.reshape(-1))
        token, log_probability = (x.reshape(now.token.shape) for x in choose(logits, noise, rule))
        ended = (token[:, :, None] == ends[None, None]).any(-1) | (now.count + 1 >= states.limit)
        slot = read % slots
        return _Loop(
            now.number + 1,
            _write(now.own_keys, new_keys, slot, 5),
            _write(now.own_values, new_values, slot, 4),
            token,
            now.count + now.running.astype(jnp.int32),
            now.running & ~ended,
            Sampled(
                now.sampled.tokens.at[now.number].set(jnp.where(now.running, token, -1)),
                now.sampled.log_probabilities.at[now.number].set(
                    jnp.where(now.running, log_probability, 0)
                ),
            ),
        )

    shape = (CHUNK, *states.token.shape)
    nothing = Sampled(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    start = _Loop(
        jnp.zeros((), jnp.int32),
        kept.own_keys,
        kept.own_values,
        states.token,
        states.count,
        states.running,
        nothing,
    )
    end = jax.lax.while_loop(lambda now: (now.number < CHUNK) & now.running.any(), extend, start)
    return kept._replace(own_keys=end.own_keys, own_values=end.own_values), end.sampled


def _row_keys(seed: jax.Array, states: RowStates) -> UInt32[Array, "GR 2"]:
    """Of each row, by the seed, its prompt's key and the number of its sample."""

    def one(prompt: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        folded = jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
        return jax.random.key_data(folded)

    return jax.vmap(one)(states.prompt_key.reshape(-1), states.sample.reshape(-1))


def _write(
    own: jax.Array, new: Float[Array, "layers GR 1 K H"], slot: jax.Array, axis: int
) -> jax.Array:
    groups = own.shape[1]
    order = "l (G R) 1 K H -> l G K R H 1" if axis == 5 else "l (G R) 1 K H -> l G K R 1 H"
    return jax.lax.dynamic_update_slice_in_dim(
        own, rearrange(new, order, G=groups).astype(own.dtype), slot, axis
    )
