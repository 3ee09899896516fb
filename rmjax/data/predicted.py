"""Numbers of tokens put where the tokens are predicted: at the place of the token before each.

A token's log-probability comes out at the place before it, so whatever goes with it must stand
there, too: whether it is trained, what another policy says of it, its advantage.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Shaped

from rmjax.data.row_layout import own_places
from rmjax.data.tokenized import TokenizedData
from rmjax.models.inputs import Rows


def at_predecessors(
    values: Callable[[int], Shaped[np.ndarray, "L"]],
    samples: Int[np.ndarray, "B S"],
    rows: Rows,
    dtype: Any,
) -> Shaped[np.ndarray, "B L"]:
    """Each token's value at the place of the token before it; 0 where no token is predicted.

    Args:
      values: of a sample's tokens, by its number. They are 0 for tokens that are predicted where
        samples share their places.
      samples: the one that each slot of a row holds, -1 for none.
      rows: in which they stand, as numpy arrays.
      dtype: of the result.
    """
    found = np.zeros(rows.tokens.shape, dtype)
    for row, slot in np.argwhere(samples >= 0).tolist():
        own = own_places(rows, row, slot)
        known = np.asarray(values(int(samples[row, slot])))
        first = len(known) - (own.stop - own.start) + 1
        assert not known[:first].any(), "a value of a token that several samples share"
        found[row, own.start : own.stop - 1] = known[first:]
    return found


def of_tokens(
    found: Float32[np.ndarray, "B L"],
    samples: Int[np.ndarray, "B S"],
    rows: Rows,
    data: TokenizedData,
    values: Float32[np.ndarray, "T"],
) -> None:
    """The inverse of `at_predecessors`: writes what was found at places into the tokens' values.

    Args:
      found: at the place before each token.
      samples: the one that each slot of a row holds, -1 for none.
      rows: in which they stand, as numpy arrays.
      data: the samples.
      values: one of each token; those of tokens that are predicted at these places are written.
    """
    for row, slot in np.argwhere(samples >= 0).tolist():
        own = own_places(rows, row, slot)
        end = data.offsets[samples[row, slot] + 1]
        values[end - (own.stop - own.start - 1) : end] = found[row, own.start : own.stop - 1]


def predicting(
    data: TokenizedData, samples: Int[np.ndarray, "B S"], rows: Rows
) -> Bool[np.ndarray, "B L"]:
    """The places that predict a token of the assistant's.

    Args:
      data: the samples, with `spoken`.
      samples: the one that each slot of a row holds, -1 for none.
      rows: in which they stand, as numpy arrays.
    """
    return at_predecessors(data.spoken_in, samples, rows, bool)
