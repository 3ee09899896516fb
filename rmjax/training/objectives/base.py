"""What an objective is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float32

from rmjax.models.parameters import Params

Scores = Float32[Array, "... S A"]


Rewards = Float32[Array, "... P"]


class Term(NamedTuple):
    """`loss(scores, targets, params)` sums over a batch; `weight(targets)` is what divides that.

    The parameters are the model's, for terms that have some of their own. A policy's targets are
    `PolicyTargets`, and its only score of a sample is the log-probability of the response.
    """

    loss: Callable[[Scores, Any, Params], Float32[Array, ""]]
    weight: Callable[[Any], Float32[Array, ""]]
