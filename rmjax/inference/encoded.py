"""A conversation as the tokens that are scored."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32


class Encoded(NamedTuple):
    """A conversation as tokens.

    Attributes:
      tokens: int32.
      cut: how many were cut away in front of them.
      where: what messages call it.
      spoken: which of them are the response, whose log-probability is the score of a language
        model; None for a reward model.
    """

    tokens: Int32[np.ndarray, "L"]
    cut: int
    where: str
    spoken: Bool[np.ndarray, "L"] | None = None

    @property
    def identity(self) -> tuple[bytes, bytes]:
        """What decides a score."""
        spoken = b"" if self.spoken is None else self.spoken.tobytes()
        return self.tokens.tobytes(), spoken
