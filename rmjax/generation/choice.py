"""The next token, drawn from logits.

R row, V vocab
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float32, Int32, UInt32

_BLOCK = 256  # tokens of the vocabulary whose probabilities are summed first
_ONE = 0x3F800000  # the bits of 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "top_k"],
    meta_fields=["greedy", "truncated"],
)
@dataclasses.dataclass(frozen=True)
class Rule:
    """How a token is drawn.

    Attributes:
      temperature: what logits are divided by.
      top_p: the most probable tokens that have so much of the probability are left; 1 for all.
      top_k: so many of the most probable tokens are left; 0 for all.
      greedy: whether the most probable token is taken, and nothing drawn.
      truncated: whether `top_p` or `top_k` leaves anything out.
    """

    temperature: Any
    top_p: Any
    top_k: Any
    greedy: bool
    truncated: bool


def make_rule(temperature: float, top_p: float, top_k: int) -> Rule:
    """The rule of these settings; a temperature of 0 is greedy."""
    greedy = temperature == 0
    return Rule(
        np.float32(1 if greedy else temperature),
        np.float32(top_p),
        np.int32(top_k),
        greedy,
        truncated=not greedy and (top_p < 1 or top_k > 0),
    )


def uniform(
    keys: UInt32[Array, "R 2"], positions: Int32[Array, "R"]
) -> tuple[Float32[Array, "R"], Float32[Array, "R"]]:
    """Two numbers from 0 to 1 of each row, by its key and the position of its next token alone."""

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.uniform(folded, (2,), jnp.float32)

    noise = jax.vmap(one)(keys, positions)
    return noise[:, 0], noise[:, 1]


def choose(
    logits: Float32[Array, "R V"],
    noise: tuple[Float32[Array, "R"], Float32[Array, "R"]],
    rule: Rule,
) -> tuple[Int32[Array, "R"], Float32[Array, "R"]]:
    """The next token of each row, and its log-probability at temperature 1 among all tokens."""
    largest = logits.max(-1, keepdims=True)
    shifted = logits - jnp.broadcast_to(largest, logits.shape)
    if rule.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        weights = jnp.exp(shifted / rule.temperature)
        if rule.truncated:
            weights = _truncate(weights, rule.top_p, rule.top_k)
        token = _draw(weights, noise)
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=1)[:, 0]
    return token, chosen - jnp.log(jnp.exp(shifted).sum(-1))


def _draw(
    weights: Float32[Array, "R V"], noise: tuple[Float32[Array, "R"], Float32[Array, "R"]]
) -> Int32[Array, "R"]:
    """An index of each row, as probable as its weight is large.

    First a block of the vocabulary, then a token in it. So one number's few bits need not tell
    apart all tokens, and nothing as long as the vocabulary is summed one by one.
    """
    padding = -weights.shape[1] % _BLOCK
    blocks = rearrange(jnp.pad(weights, ((0, 0), (0, padding))), "R (b t) -> R b t", t=_BLOCK)
    block = _place(blocks.sum(-1), noise[0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _place(inside, noise[1])


def _place(weights: Float32[Array, "R n"], noise: Float32[Array, "R"]) -> Int32[Array, "R"]:
    """Where `noise` falls if the interval from 0 to 1 is divided as the weights are."""
    # Rounded sums need not grow where weights are 0: such places are left out.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=1), 0)
    wanted = jnp.broadcast_to((noise * sums.max(-1))[:, None], sums.shape)
    return jnp.argmax(sums > wanted, axis=1).astype(jnp.int32)


def _truncate(weights: Float32[Array, "R V"], top_p: Any, top_k: Any) -> Float32[Array, "R V"]:
    """Weights (up to 1) with those of the least probable tokens 0: first by `top_k`, then `top_p`.

    Tokens as probable as the last one that is left are left too.
    """
    ones = jnp.ones_like(weights)
    count = jnp.where(top_k > 0, top_k, weights.shape[1]).astype(jnp.float32)
    weights = _at_least(weights, ones, jnp.broadcast_to(count, weights.shape[:1]))
    kept = _at_least(weights, weights, top_p * weights.sum(-1))
    return jnp.where(top_p < 1, kept, weights)


def _at_least(
    weights: Float32[Array, "R V"], sizes: Float32[Array, "R V"], most: Float32[Array, "R"]
) -> Float32[Array, "R V"]:
    """Those weights for which the sizes of all larger ones sum to less than `most`; others are 0.

    Of floats that are not negative the bits, read as integers, have the same order. So the smallest
    that is left is found bit by bit, and nothing is sorted.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the smallest that is left is above `low` and at most `high`
        middle = low + (high - low) // 2
        larger = bits > jnp.broadcast_to(middle[:, None], bits.shape)
        enough = jnp.where(larger, sizes, 0).sum(-1) < most
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bounds = (jnp.full(most.shape, -1, jnp.int32), jnp.full(most.shape, _ONE, jnp.int32))
    smallest = jax.lax.fori_loop(0, 31, halve, bounds)[1]
    return jnp.where(bits >= jnp.broadcast_to(smallest[:, None], bits.shape), weights, 0)
