"""Terms that learn from ratings."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rmjax.data.batch import Targets
from rmjax.models.parameters import THRESHOLDS, Params
from rmjax.models.rewards.ordinal import negative_log_likelihood
from rmjax.training.objectives.base import Scores


def squared_error(scores: Scores, targets: Targets, params: Params) -> jax.Array:
    """Sum of the squared errors of all ratings."""
    # Empty slots hold arbitrary scores: select before squaring, so that no infinity times zero
    # can reach the sum or the gradient.
    labels, weights = targets.ratings
    error = jnp.where(weights > 0, scores - labels, 0.0)
    return jnp.sum(weights * jnp.square(error))


def ordinal(lowest: int) -> Callable[[Scores, Targets, Params], jax.Array]:
    """Sum of the negative log-likelihoods of all ratings, whose levels begin at `lowest`."""

    def loss(scores: Scores, targets: Targets, params: Params) -> jax.Array:
        labels, weights = targets.ratings
        present = weights > 0
        numbers, level = (jnp.where(present, x, 0.0) for x in (scores, labels - lowest))
        found = negative_log_likelihood(numbers, level, params[THRESHOLDS.path])
        return jnp.sum(weights * found)

    return loss


def sum_of_ratings(targets: Targets) -> jax.Array:
    """How many ratings there are."""
    return jnp.sum(targets.ratings.weights)
