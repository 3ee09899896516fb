"""Log-probabilities of given tokens, without the logits of all places in memory at once.

The logits of 8,192 places among 128k words are 4.2 GB. So places are taken in chunks, forward and
backward: what is kept in between is one number a place, the logarithm of the sum over the
vocabulary. Only places that are wanted are computed; the others cost nothing.

Each device computes the places it holds, on the part of the vocabulary it holds. So the matrix is
gathered once, its gradient summed over devices once, and no collective runs in a loop.

B row, L token, D embed, V vocab; on one device: N place, C place of a chunk
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from rmjax.models.attention.mask import soft_capped
from rmjax.models.inputs import Rows
from rmjax.runtime.sharding import ACTIVATION_AXES, PARAMETER_AXES, Sharding

# Places computed at once on a device, at most: 525 MB of logits of 128k words. With fewer, adding
# to the matrix' gradient, whose time does not depend on them, would take as long as the products.
_CHUNK = 1024
_SMALLEST_CHUNK = 128
CHUNK_LOOP = "chunks"  # the scope of the loop over them, in the program's text

_ROWS: Any = ACTIVATION_AXES["row"]
_LENGTH: Any = ACTIVATION_AXES["length"]
_EMBED: Any = PARAMETER_AXES["embed"]
_VOCAB: Any = PARAMETER_AXES["vocab"]
# Devices that hold other places, and the same part of the matrix.
_REPLICAS = tuple(axis for axis in (*_ROWS, _LENGTH) if axis not in _EMBED)
_PLACES, _HIDDEN, _MATRIX = P(_ROWS, _LENGTH), P(_ROWS, _LENGTH), P(_EMBED, _VOCAB)


class LogProbabilities(NamedTuple):
    """What a model says of given tokens; 0 in places that were not wanted.

    Attributes:
      tokens: the log-probability of each token, given what its place sees.
      entropy: of the distribution that the token is from, in nats.
    """

    tokens: Float32[Array, "B L"]
    entropy: Float32[Array, "B L"]


def log_probabilities(
    hidden: Float[Array, "B L D"],
    matrix: Float[Array, "D V"],
    targets: Int32[Array, "B L"],
    wanted: Bool[Array, "B L"],
    sharding: Sharding,
    soft_cap: float | None = None,
) -> LogProbabilities:
    """The log-probability of a token at each wanted place, and the entropy there.

    Products are in the dtype of `hidden` and summed in float32; all else is float32, the gradient
    of `matrix` too. Both results have gradients by `hidden` and `matrix`.

    Args:
      hidden: states after the final norm; anything where `wanted` is false.
      matrix: from states to logits; see `heads.LanguageModelHead.matrix`.
      targets: the token whose probability is asked for; anything where `wanted` is false.
      wanted: which places are computed.
      sharding: the mesh.
      soft_cap: of the logits; see `heads.LanguageModelHead`.
    """
    computed: Any = _computed(hidden, matrix, targets, wanted, sharding, soft_cap)
    return LogProbabilities._make(computed)


def next_tokens(rows: Rows) -> Int32[Array, "B L"]:
    """The token behind each place. It is the sample's own next one in all places but two kinds:

    at the end of a sample there is none, and behind a shared prefix each sample goes on by itself.
    """
    return jnp.roll(rows.tokens, -1, axis=1)


def chunk_size(places: int) -> int:
    """Places computed at once, on a device that holds so many.

    A quarter of them at most: the last chunk is filled up with places that nobody wants.
    """
    return min(places, _CHUNK, max(_SMALLEST_CHUNK, math.ceil(places / 4)))


def sums_of_samples(values: Float32[Array, "B L"], rows: Rows) -> Float32[Array, "B S"]:
    """Sums over the places of each sample that predict a token of its own; 0 in empty slots.

    Its last place predicts none, and the prefix that it shares is nobody's own.
    """
    ends = rows.last_token_index
    begins = jnp.take_along_axis(rows.masked_end, ends, axis=1)
    places = jax.lax.broadcasted_iota(jnp.int32, (*ends.shape, values.shape[1]), 2)
    own = (places >= begins[:, :, None]) & (places < ends[:, :, None])
    return jnp.sum(jnp.where(own, values[:, None, :], 0.0), axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _computed(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    sharding: Sharding,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, matrix, targets, wanted, sharding, soft_cap)[0]


def _forward(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    sharding: Sharding,
    soft_cap: float | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    tokens, entropy, total = jax.shard_map(
        functools.partial(_values, soft_cap),
        mesh=sharding.mesh,
        in_specs=(_HIDDEN, _MATRIX, _PLACES, _PLACES),
        out_specs=(_PLACES, _PLACES, _PLACES),
        check_vma=False,
    )(hidden, matrix, targets, wanted)
    return (tokens, entropy), (hidden, matrix, targets, wanted, total, entropy)


def _backward(
    sharding: Sharding,
    soft_cap: float | None,
    residuals: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    gradients: Any = jax.shard_map(
        functools.partial(_gradients, soft_cap),
        mesh=sharding.mesh,
        in_specs=(_HIDDEN, _MATRIX, *[_PLACES] * 6),
        out_specs=(_HIDDEN, _MATRIX),
        check_vma=False,
    )
    return *gradients(*residuals, *cotangents), None, None


_computed.defvjp(_forward, _backward)


# ---- one device ---------------------------------------------------------------------------------


def _values(
    soft_cap: float | None,
    hidden: Float[Array, "B L D"],
    matrix: Float[Array, "d v"],
    targets: Int32[Array, "B L"],
    wanted: Bool[Array, "B L"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, entropies and the logarithms of the sums over the vocabulary."""
    states, weights = _flat(hidden), _gathered(matrix, hidden.dtype)
    columns = _columns(targets, weights.shape[1])

    def chunk(places: jax.Array, found: jax.Array) -> jax.Array:
        logits = soft_capped(_logits(_take(states, places), weights), soft_cap)
        largest = jnp.max(logits, axis=1)
        shifted = logits - largest[:, None]
        exponentials = jnp.exp(shifted)
        own = _is_target(_take(columns, places), logits.shape)
        numbers = [
            largest,
            jnp.sum(exponentials, axis=1),
            jnp.sum(exponentials * shifted, axis=1),
            jnp.sum(jnp.where(own, logits, 0.0), axis=1),
        ]
        return found.at[places].set(jnp.stack(numbers, axis=1), mode="drop")

    # What a place has that is not computed: any finite numbers whose logarithm is one.
    nothing = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0, 0.0], jnp.float32), (len(states), 4))
    found = _in_chunks(chunk, nothing, _flat(wanted))
    largest, total, moment, target = found.T
    # Each device's sums are of exp(logit - its own largest one): bring them to the largest of all.
    overall = jax.lax.pmax(largest, _VOCAB)
    below = largest - overall
    sums = jnp.stack([total, moment + below * total]) * jnp.exp(below)[None]
    total, moment, target = jax.lax.psum(jnp.concatenate([sums, target[None]]), _VOCAB)
    logarithm = jnp.log(total)
    values = target - overall - logarithm, logarithm - moment / total, overall + logarithm
    tokens, entropy, whole = (x.reshape(wanted.shape) for x in values)
    return jnp.where(wanted, tokens, 0.0), jnp.where(wanted, entropy, 0.0), whole


def _gradients(
    soft_cap: float | None,
    hidden: Float[Array, "B L D"],
    matrix: Float[Array, "d v"],
    targets: Int32[Array, "B L"],
    wanted: Bool[Array, "B L"],
    total: Float32[Array, "B L"],
    entropy: Float32[Array, "B L"],
    by_tokens: Float32[Array, "B L"],
    by_entropy: Float32[Array, "B L"],
) -> tuple[jax.Array, jax.Array]:
    """By `hidden` and by `matrix`. Of a logit it is, with p its probability and H the entropy,

    (1 if the token is the target, else 0, less p) by_tokens - p (log p + H) by_entropy
    """
    states, weights = _flat(hidden), _gathered(matrix, hidden.dtype)
    columns = _columns(targets, weights.shape[1])
    numbers = jnp.stack([_flat(x) for x in (total, entropy, by_tokens, by_entropy)], axis=1)

    def chunk(places: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_states, by_weights = sums
        taken = _take(states, places)
        whole, spread, first, second = (x[:, None] for x in _take(numbers, places).T)
        logits = soft_capped(_logits(taken, weights), soft_cap)
        logs = logits - whole
        own = _is_target(_take(columns, places), logs.shape)
        by_logits = jnp.where(own, first, 0.0) - jnp.exp(logs) * (first + second * (logs + spread))
        if soft_cap is not None:  # of c tanh(x / c): 1 - tanh(x / c)^2
            by_logits *= 1 - jnp.square(logits / soft_cap)
        by_logits = by_logits.astype(taken.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        by_states = by_states.at[places].set(product("cv,dv->cd", by_logits, weights), mode="drop")
        return by_states, by_weights + product("cd,cv->dv", taken, by_logits)

    start = jnp.zeros(states.shape, jnp.float32), jnp.zeros(weights.shape, jnp.float32)
    by_states, by_weights = _in_chunks(chunk, start, _flat(wanted))
    by_states = jax.lax.psum(by_states, _VOCAB)
    by_weights = jax.lax.psum_scatter(by_weights, _EMBED, scatter_dimension=0, tiled=True)
    by_weights = jax.lax.psum(by_weights, _REPLICAS)
    return by_states.reshape(hidden.shape).astype(hidden.dtype), by_weights.astype(matrix.dtype)


def _in_chunks(
    chunk: Callable[[Int32[Array, "C"], Any], Any],
    start: Any,
    wanted: Bool[Array, "N"],
) -> Any:
    """`chunk` applied to the wanted places, `chunk_size` at a time, one result to the next.

    The last chunk is filled up with the place `N`, which does not exist: see `_take`.
    """
    count = len(wanted)
    size = chunk_size(count)
    whole = math.ceil(count / size) * size
    (places,) = jnp.nonzero(wanted, size=whole, fill_value=count)
    places = places.astype(jnp.int32)

    def step(number: jax.Array, value: Any) -> Any:
        return chunk(jax.lax.dynamic_slice_in_dim(places, number * size, size), value)

    with jax.named_scope(CHUNK_LOOP):
        return jax.lax.fori_loop(0, (jnp.sum(wanted) + size - 1) // size, step, start)


def _take(x: Array, places: Int32[Array, "C"]) -> Array:
    """`x` at these places, and 0 at one that does not exist."""
    return x.at[places].get(mode="fill", fill_value=0)


def _flat(x: Array) -> Array:
    """The places of all rows on one axis."""
    return x.reshape(-1, *x.shape[2:])


def _gathered(matrix: Float[Array, "d v"], dtype: Any) -> Float[Array, "D v"]:
    return jax.lax.all_gather(matrix.astype(dtype), _EMBED, axis=0, tiled=True)


def _columns(targets: Int32[Array, "B L"], vocabulary: int) -> Int32[Array, "N"]:
    """The targets as columns of this device's part of the vocabulary, outside of it elsewhere."""
    return _flat(targets) - jax.lax.axis_index(_VOCAB) * vocabulary


def _is_target(columns: Int32[Array, "C"], shape: tuple[int, ...]) -> Bool[Array, "C v"]:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == columns[:, None]


def _logits(states: Float[Array, "C D"], weights: Float[Array, "D v"]) -> Float32[Array, "C v"]:
    return jnp.einsum("cd,dv->cv", states, weights, preferred_element_type=jnp.float32)
