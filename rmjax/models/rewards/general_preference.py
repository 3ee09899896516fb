"""General preferences: which of two responses is better, where all of them need have no order.

A response is a vector v of 2k numbers, the head's, at length 1. It is preferred over another by

    margin(i, j) = v_i^T R v_j / beta,    P(i over j) = sigmoid(margin(i, j))

R is block-diagonal, of k blocks [[0, 1], [-1, 0]], so that margin(j, i) = -margin(i, j): with k = 1
it goes by the sine of the angle from v_i to v_j. Rock, paper and scissors are three vectors at 120
degrees, which no rewards can be. Zhang et al., "General Preference Modeling with Preference
Representations for Aligning Language Models", arXiv 2410.02197.

Of the paper: the form of R, vectors of length 1 and beta = .1. Not of it: factors of the blocks
that depend on the prompt. They are read at the prompt's end by a head of their own, for which
`LlamaForSequenceClassification` has no place; they are positive, so with k = 1 no sign changes.

Take k = 2 at least. Vectors begin near each other, as the hidden states do. In a plane the way from
there to a cycle is uphill: to part costs by the square of the angle, the cycle gains by its cube.
In more dimensions there are directions that cost nothing, and the gain is by the square.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float64

NAME = "general_preference"
# Under a squared length of 1e-12 a vector has no direction; its gradient is finite all the same.
_LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class GeneralPreference:
    """A rule that compares: part of `rmjax.json`, where `scalar.ScalarRule` is for other models.

    Attributes:
      beta: the margin is the product of two vectors of length 1 divided by it.
    """

    beta: float = 0.1

    @property
    def name(self) -> str:
        """What results say of the rule."""
        return NAME

    def margins(self, first: Any, second: Any) -> Any:
        """By how much the first are preferred over the second, as the log of the odds.

        Args:
          first: the head's numbers [..., 2k], of `jax.numpy` or `numpy`.
          second: likewise.

        Returns:
          [...], antisymmetric to the bit.
        """
        a, b = _of_length_one(first), _of_length_one(second)
        products = a[..., 0::2] * b[..., 1::2] - a[..., 1::2] * b[..., 0::2]
        return products.sum(-1) / self.beta

    def values(self, scores: Float[np.ndarray, "... n A"]) -> Float64[np.ndarray, "... n"]:
        """Each response's mean margin over all n responses to its prompt, itself included as 0.

        Of two responses the values therefore differ by the margin. It is a Borda count: what is
        beaten by everything is last, and in a cycle all are equal. One response alone has no value
        (NaN).
        """
        if scores.shape[-2] < 2:
            return np.full(scores.shape[:-1], np.nan)
        scores = scores.astype(np.float64)
        return self.margins(scores[..., :, None, :], scores[..., None, :, :]).mean(-1)


def _of_length_one(vectors: Float[Array, "... A"]) -> Float[jax.Array, "... A"]:
    """NaN of vectors whose squared length is beyond their dtype, which would become 0."""
    squared = (vectors * vectors).sum(-1, keepdims=True)
    return vectors * ((squared + _LEAST) ** -0.5 + 0 * squared)
