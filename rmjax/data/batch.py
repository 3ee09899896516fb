"""The arrays of a batch: the model's input and what its scores are compared with."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Bool, Float32, Int32

from rmjax.models.inputs import ROWS_AXES, Rows


class Ratings(NamedTuple):
    """Human ratings of each sample.

    Attributes:
      labels: the ratings, raw; 0 where there is none.
      weights: 1 where a rating is present, else 0.
    """

    labels: Float32[jax.Array, "... S A"]
    weights: Float32[jax.Array, "... S A"]


class Pairs(NamedTuple):
    """Which of two samples in one row people prefer.

    Attributes:
      chosen: slot of the preferred sample; 0 where there is no pair.
      rejected: slot of the other one.
      weights: 1 where there is a pair, else 0.
      strengths: how much better the preferred one is, raw; 0 in a tie or without a pair, and 1
        where the data do not say.
    """

    chosen: Int32[jax.Array, "... P"]
    rejected: Int32[jax.Array, "... P"]
    weights: Float32[jax.Array, "... P"]
    strengths: Float32[jax.Array, "... P"]


class Targets(NamedTuple):
    """What the scores of a row's samples are compared with; either may be empty."""

    ratings: Ratings
    pairs: Pairs


class Responses(NamedTuple):
    """What a policy is asked about the samples of a row, whose responses it may learn.

    Attributes:
      predicting: the places that predict a token of a response; see `data/predicted.py`.
      lengths: how many tokens each sample's response has.
      imitated: how often a response is one to learn: once, in several pairs as often as it is
        chosen; never if it is always rejected.
      reference: the log-probability of each sample's response by the policy that the trained one
        is held to; 0 without one.
    """

    predicting: Bool[jax.Array, "... L"]
    lengths: Float32[jax.Array, "... S"]
    imitated: Float32[jax.Array, "... S"]
    reference: Float32[jax.Array, "... S"]


class PolicyTargets(NamedTuple):
    """What a policy learns from a row; either may be empty."""

    responses: Responses
    pairs: Pairs


class Rollouts(NamedTuple):
    """What a policy learns from samples of its own, at the places that predict their tokens.

    Attributes:
      predicting: the places that predict a token of a sample.
      slots: which of the row's samples that token is of; 0 elsewhere.
      values: of that token, `TokenValues`, or of a critic `TokenReturns`: arrays [..., L] of
        float32.
    """

    predicting: Bool[jax.Array, "... L"]
    slots: Int32[jax.Array, "... L"]
    values: Any


class Batch(NamedTuple):
    """One optimizer step's data: M micro-batches of B rows with S sample slots.

    Attributes:
      rows: the model's input.
      targets: what the objective compares the scores with; a policy's are `PolicyTargets`, or
        `Rollouts` if it learns from its own samples.
      samples: the sample's index in its data set, -1 in empty slots.
      microbatches: how many of the M micro-batches are not empty.
    """

    rows: Rows
    targets: Targets | PolicyTargets | Rollouts
    samples: Int32[jax.Array, "M B S"]
    microbatches: Int32[jax.Array, ""]


_PAIRS_AXES = Pairs._make([("row", "sample")] * 4)
TARGETS_AXES = Targets(Ratings._make([("row", "sample", "attribute")] * 2), _PAIRS_AXES)
POLICY_TARGETS_AXES = PolicyTargets(
    Responses(("row", "length"), *[("row", "sample")] * 3),  # pyright: ignore[reportArgumentType]
    _PAIRS_AXES,
)


def _by_microbatch(axes: Any) -> Any:
    return jax.tree.map(
        lambda names: ("microbatch", *names), axes, is_leaf=lambda x: type(x) is tuple
    )


# The names of each array's axes in a step's batch.
BATCH_AXES = Batch._make(
    [_by_microbatch(ROWS_AXES), _by_microbatch(TARGETS_AXES), ("microbatch", "row", "sample"), ()]
)
POLICY_BATCH_AXES = BATCH_AXES._replace(targets=_by_microbatch(POLICY_TARGETS_AXES))


def batch_axes(batch: Batch) -> Batch:
    """The names of each array's axes in this batch."""
    if isinstance(batch.targets, Rollouts):
        places: Any = jax.tree.map(lambda _: ("microbatch", "row", "length"), batch.targets)
        return BATCH_AXES._replace(targets=places)
    return POLICY_BATCH_AXES if isinstance(batch.targets, PolicyTargets) else BATCH_AXES
