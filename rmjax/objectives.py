"""Objectives: what is minimised, as values.

An objective is two functions of a batch. The loss is a sum, and the step divides it by the weight
of the whole batch, over all micro-batches and devices: so the loss and its gradient are the same
however the batch is packed, accumulated or sharded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rmjax.rows import Pairs, Ratings

Scores = Float32[Array, "... S A"]


class Objective(NamedTuple):
    """`loss(scores, targets)` sums over the batch, `weight(targets)` normalises it.

    `targets` is the kind of targets it needs, and so the kind of data.
    """

    loss: Callable[[Scores, Any], Float32[Array, ""]]
    weight: Callable[[Any], Float32[Array, ""]]
    targets: type[Ratings] | type[Pairs]


def _squared_error(scores: Scores, targets: Ratings) -> jax.Array:
    # Empty slots hold arbitrary scores: select before squaring, so that no infinity times zero
    # can reach the sum or the gradient.
    error = jnp.where(targets.weights > 0, scores - targets.labels, 0.0)
    return jnp.sum(targets.weights * jnp.square(error))


def _bradley_terry(scores: Scores, targets: Pairs) -> jax.Array:
    reward = scores[..., 0]
    chosen = jnp.take_along_axis(reward, targets.chosen, axis=-1)
    rejected = jnp.take_along_axis(reward, targets.rejected, axis=-1)
    margin = jnp.where(targets.weights > 0, chosen - rejected, 0.0)
    return jnp.sum(targets.weights * jax.nn.softplus(-margin))


def _sum_of_weights(targets: Ratings | Pairs) -> jax.Array:
    return jnp.sum(targets.weights)


# HelpSteer2 (arXiv 2406.08673): mean squared error over the labels that are present.
regression = Objective(_squared_error, _sum_of_weights, Ratings)

# Bradley and Terry (1952): -log sigmoid(chosen - rejected), a mean over pairs. The reward is the
# first attribute.
bradley_terry = Objective(_bradley_terry, _sum_of_weights, Pairs)

OBJECTIVES: dict[str, Objective] = {"regression": regression, "bradley_terry": bradley_terry}
