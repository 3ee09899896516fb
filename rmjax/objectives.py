"""Objectives: what is minimised, as values.

An objective is two functions of a batch. The loss is a sum, and the step divides it by the weight
of the whole batch, over all micro-batches and devices: so the loss and its gradient are the same
however the batch is packed, accumulated or sharded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

Labels = Float32[Array, "... S A"]


class Objective(NamedTuple):
    """`loss(scores, labels, weights)` sums over the batch, `weight(weights)` normalises it."""

    loss: Callable[[Labels, Labels, Labels], Float32[Array, ""]]
    weight: Callable[[Labels], Float32[Array, ""]]


def _squared_error(scores: Labels, labels: Labels, weights: Labels) -> jax.Array:
    # Empty slots hold arbitrary scores: select before squaring, so that no infinity times zero
    # can reach the sum or the gradient.
    error = jnp.where(weights > 0, scores - labels, 0.0)
    return jnp.sum(weights * jnp.square(error))


# HelpSteer2 (arXiv 2406.08673): mean squared error over the labels that are present.
regression = Objective(loss=_squared_error, weight=jnp.sum)

OBJECTIVES: dict[str, Objective] = {"regression": regression}
