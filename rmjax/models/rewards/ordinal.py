"""Ordinal ratings: a rating is where a number lies among thresholds.

    P(rating > level) = s(f - theta)

s is the logistic function, theta the threshold behind the level, f the head's number for an
attribute. Levels are the whole numbers of the ratings' range, and thresholds, one fewer, are
learned for each attribute: how far it is from 3 to 4 is for the data to say, and need not be what
it is from 0 to 1. McCullagh, "Regression Models for Ordinal Data", J. R. Statist. Soc. B 42, 1980
(proportional odds). Rennie and Srebro, "Loss Functions for Preference Levels", 2005, compare it
with losses that are no likelihood.

What a model says of an attribute is the expected rating, lowest level + sum of s(f - theta).

    K threshold, A attribute, S sample
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float, Float32, Float64

from rmjax.errors import UserError

# No two thresholds are nearer: a level that no training rating has would otherwise become
# impossible, and a held-out one of that level give an infinite loss.
_LEAST_GAP = 0.01
_AT_ZERO = float(np.log(np.expm1(1.0 - _LEAST_GAP)))  # makes the gap 1 where the parameter is 0


@dataclasses.dataclass(frozen=True)
class OrdinalScale:
    """How the head's numbers of some attributes are read as ratings: part of `rmjax.json`.

    Attributes:
      lowest: level.
      highest: level.
      attributes: those that were rated; the others' numbers are what they are.
      thresholds: one row for each of the attributes, rising. None in the file of a run, whose
        checkpoints have them.
    """

    lowest: int
    highest: int
    attributes: tuple[str, ...]
    thresholds: tuple[tuple[float, ...], ...] = ()

    @property
    def count(self) -> int:
        """How many thresholds an attribute has."""
        return self.highest - self.lowest

    def with_raw(self, raw: Float32[np.ndarray, "K A"], names: tuple[str, ...]) -> "OrdinalScale":
        """The scale with thresholds from the parameter, whose columns are `names`."""
        found = ordered(np.asarray(raw, np.float64), np)[0].T.tolist()
        rows = tuple(tuple(found[names.index(name)]) for name in self.attributes)
        return dataclasses.replace(self, thresholds=rows)

    def raw(self, names: tuple[str, ...]) -> Float32[np.ndarray, "K A"]:
        """The parameter that gives these thresholds; 0 in columns without them."""
        found = np.zeros((self.count, len(names)), np.float32)
        for name, row in zip(self.attributes, self.thresholds):
            theta = np.asarray(row)
            gaps = np.maximum(np.diff(theta) - _LEAST_GAP, 1e-6)
            # That is log(expm1(gaps)), and finite for large ones.
            parts = gaps + np.log(-np.expm1(-gaps)) - _AT_ZERO
            column = [theta[0] + (self.count - 1) / 2, *parts]
            found[:, names.index(name)] = column
        return found

    def read(
        self, numbers: Float[np.ndarray, "N A"], names: tuple[str, ...]
    ) -> Float64[np.ndarray, "N A"]:
        """Expected ratings in place of the head's numbers, in the columns that have thresholds."""
        scores = numbers.astype(np.float64)
        for name, row in zip(self.attributes, self.thresholds):
            column = names.index(name)
            above = scipy.special.expit(scores[:, column, None] - row)
            scores[:, column] = self.lowest + above.sum(axis=1)
        return scores


def levels(label_range: tuple[float, float]) -> tuple[int, int]:
    """The lowest and the highest level; or a `UserError`."""
    low, high = label_range
    if not (float(low).is_integer() and float(high).is_integer() and low < high):
        raise UserError(
            f"config.data.label_range = {label_range!r}: the levels of the objective 'ordinal' are "
            "whole numbers, and so are the lowest and the highest"
        )
    return int(low), int(high)


def ordered(raw: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Thresholds, and the gaps between them, from a parameter of any numbers.

    Its first row is the place of the first threshold, the others become gaps by softplus. Zeros are
    thresholds around 0, 1 apart.

    Args:
      raw: [K, A].
      xp: `jax.numpy` or `numpy`.

    Returns:
      [K, A], rising along K; and [K - 1, A].
    """
    # Not by slices of the parameter: JAX 0.10 cannot sum their gradients over micro-batches.
    gaps = _LEAST_GAP + xp.logaddexp(raw + _AT_ZERO, xp.zeros_like(raw))
    is_first = np.arange(raw.shape[0])[:, None] + np.zeros(raw.shape[1:]) == 0
    parts = xp.where(is_first, raw - (raw.shape[0] - 1) / 2, gaps)
    return xp.cumsum(parts, axis=0), parts[1:]


def negative_log_likelihood(
    numbers: Float32[Array, "... S A"],
    level: Float32[Array, "... S A"],
    raw: Float32[Array, "K A"],
) -> Float32[Array, "... S A"]:
    """-log P(rating = level), of levels counted from 0.

    With a and b the number less the threshold below and the one above, P is s(a) - s(b), which is
    s(a) s(-b) (1 - exp(b - a)): so no difference of probabilities is ever taken.

    Args:
      numbers: the head's.
      level: 0 to K.
      raw: see `ordered`.
    """
    theta, gaps = ordered(raw)
    shape = (*numbers.shape, theta.shape[0])
    distance = numbers[..., None] - jnp.broadcast_to(theta.T, shape)
    place = jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)
    level = level[..., None]
    below = jnp.where(place == level - 1, jax.nn.softplus(-distance), 0.0)
    above = jnp.where(place == level, jax.nn.softplus(distance), 0.0)
    inner = -jnp.log(-jnp.expm1(-gaps)).T
    inner = jnp.broadcast_to(inner, (*numbers.shape, inner.shape[-1]))
    between = jnp.where(place[..., 1:] == level, inner, 0.0)
    return below.sum(-1) + above.sum(-1) + between.sum(-1)
