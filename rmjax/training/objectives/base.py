"""What an objective is made of."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float32

from rmjax.data.batch import Targets
from rmjax.models.parameters import Params

Scores = Float32[Array, "... S A"]


Rewards = Float32[Array, "... P"]


class Term(NamedTuple):
    """`loss(scores, targets, params)` sums over a batch; `weight(targets)` is what divides that.

    The parameters are the model's, for terms that have some of their own.
    """

    loss: Callable[[Scores, Targets, Params], Float32[Array, ""]]
    weight: Callable[[Targets], Float32[Array, ""]]
