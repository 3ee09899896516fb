"""Ridge regression of ratings on features, in closed form; its strength chosen without a look
at held-out data.

For each attribute the head w minimises, over its ratings y and their samples' features F,

    |F w - y|^2 + strength * |w - (w.m) m|^2

where m is the mean feature scaled to length 1. A head has no bias, and nothing in the model's
format could hold one. Along m all samples have nearly the same feature, so what is not penalised
there stands in for it: ratings far from 0 cost the ridge nothing.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from rmjax.errors import UserError

# Of the largest eigenvalue of what is penalised.
STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-12, 5))
_RANK = 1e-12  # eigenvalues below so many of the largest one are rounding


class Ridge(NamedTuple):
    """What was fitted.

    Attributes:
      head: one column an attribute.
      strengths: of each attribute, one of `STRENGTHS`.
      freedom: effective degrees of freedom of each attribute's fit, the trace of its hat matrix.
      left_out: the training samples' scores by heads that were fitted without their prompts; NaN
        where there is no rating.
    """

    head: Float32[np.ndarray, "D A"]
    strengths: tuple[float, ...]
    freedom: tuple[float, ...]
    left_out: Float32[np.ndarray, "N A"]


def fit_ridge(
    features: Float32[np.ndarray, "N D"],
    labels: Float32[np.ndarray, "N A"],
    groups: Int[np.ndarray, "N"],
    attributes: tuple[str, ...],
) -> Ridge:
    """The head, each attribute at the strength that predicts prompts it was not fitted on best.

    That is leaving out one prompt with all its responses at a time, which for ridge needs no other
    fit: what a prompt's scores are off by without it is (1 - H_gg)^-1 times what they are off by
    with it, H the hat matrix and H_gg the prompt's block of it.

    Args:
      features: of the training samples.
      labels: their ratings; NaN where there is none.
      groups: number of each sample's prompt.
      attributes: their names, for messages.

    Raises:
      UserError: an attribute has ratings for fewer than two prompts.
    """
    present = ~np.isnan(labels)
    count = labels.shape[1]
    heads = np.empty((features.shape[1], count))
    left_out = np.full(labels.shape, np.nan, np.float32)
    strengths, freedom = [0.0] * count, [0.0] * count
    for pattern in np.unique(present, axis=1).T:  # attributes rated together are solved together
        columns = np.flatnonzero((present == pattern[:, None]).all(axis=0))
        if len(np.unique(groups[pattern])) < 2:
            raise UserError(
                f"attribute {attributes[columns[0]]!r} has ratings for fewer than 2 prompts: too "
                "few to choose the ridge's strength by leaving each out"
            )
        problem = _Problem(features[pattern].astype(np.float64), groups[pattern])
        y = labels[pattern][:, columns].astype(np.float64)
        found = [problem.leave_out(y, strength) for strength in STRENGTHS]
        errors = np.asarray([np.square(y - scores).mean(axis=0) for scores in found])
        for column, best, own in zip(columns, errors.argmin(axis=0), range(len(columns))):
            strengths[column] = STRENGTHS[best]
            heads[:, column] = problem.solve(y[:, [own]], STRENGTHS[best])[:, 0]
            freedom[column] = problem.freedom(STRENGTHS[best])
            left_out[pattern, column] = found[best][:, own]
    return Ridge(heads.astype(np.float32), tuple(strengths), tuple(freedom), left_out)


class _Problem:
    """Ridge problems with the same samples, decomposed once for all strengths and ratings.

    The component along m is regressed out first (Frisch and Waugh): its coefficient is whatever
    fits best, and the rest is an ordinary ridge of what is left of ratings and features.
    """

    def __init__(self, features: Float[np.ndarray, "n D"], groups: Int[np.ndarray, "n"]):
        mean = features.mean(axis=0)
        self._m = mean / max(np.linalg.norm(mean), np.finfo(np.float64).tiny)
        along = features @ self._m
        self._z = along / max(np.linalg.norm(along), np.finfo(np.float64).tiny)
        self._along, self._features = along, features
        rest = features - along[:, None] * self._m
        rest -= self._z[:, None] * (self._z @ rest)
        self._u, self._values, self._v = _decompose(rest)
        order = np.argsort(groups, kind="stable")
        self._groups = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)

    def _shrunk(self, strength: float) -> Float[np.ndarray, "r"]:
        return self._values / (self._values + strength * self._values.max(initial=1e-300))

    def solve(self, y: Float[np.ndarray, "n a"], strength: float) -> Float[np.ndarray, "D a"]:
        """The weights."""
        roots = np.sqrt(self._values)
        across = self._v @ ((self._shrunk(strength) / roots)[:, None] * (self._u.T @ y))
        length = max(self._along @ self._along, np.finfo(np.float64).tiny)
        rest = self._features @ across - self._along[:, None] * (self._m @ across)
        return across + np.outer(self._m, self._along @ (y - rest) / length)

    def freedom(self, strength: float) -> float:
        """The trace of the hat matrix."""
        return float(self._z @ self._z + self._shrunk(strength).sum())

    def leave_out(self, y: Float[np.ndarray, "n a"], strength: float) -> Float[np.ndarray, "n a"]:
        """What each sample's scores would be without its prompt."""
        shrunk = self._shrunk(strength)
        fitted = self._u @ (shrunk[:, None] * (self._u.T @ y)) + np.outer(self._z, self._z @ y)
        off = y - fitted
        for members in self._groups:
            u, z = self._u[members], self._z[members]
            hat = (u * shrunk) @ u.T + np.outer(z, z)
            # A prompt that alone decides some direction leaves it open; any answer does there.
            off[members] = np.linalg.lstsq(np.eye(len(members)) - hat, off[members])[0]
        return y - off


def _decompose(
    matrix: Float[np.ndarray, "n D"],
) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "r"], Float[np.ndarray, "D r"]]:
    """`u`, squared singular values and `v` of a matrix, by the smaller of its two products."""
    wide = matrix.shape[0] < matrix.shape[1]
    values, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    kept = values > _RANK * values.max(initial=0.0)
    values, vectors = values[kept], vectors[:, kept]
    other = (matrix.T if wide else matrix) @ vectors / np.sqrt(values)
    return (vectors, values, other) if wide else (other, values, vectors)
