"""Attention inside packed rows: one function with one meaning.

A token attends to the tokens of its own sample up to itself. In rows that hold a beginning once
for all samples of a group, these are the group's tokens up to itself without those of other
samples. The layout that says so is built once a row and passed to every layer.
"""

from typing import Protocol

from jaxtyping import Array, Float

from rmjax.blocks import in_blocks
from rmjax.mask import Layout


class Plan(Protocol):
    """A layout as a kernel wants it."""

    def attend(
        self, q: Float[Array, "B L N H"], k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]
    ) -> Float[Array, "B L N H"]:
        """What `attention` gives."""
        ...


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    layout: Layout | Plan,
) -> Float[Array, "B L N H"]:
    """Softmax attention, grouped queries, logits and softmax in float32.

    Places without a sample get arbitrary finite values.

    Args:
      q: queries.
      k: keys.
      v: values.
      layout: as rows have it, or as a kernel wants it; see `kernels.prepare`.

    Returns:
      The attended values, in the dtype of `q`. They have the name `RESULT` for remat policies.
    """
    if isinstance(layout, Layout):
        return in_blocks(q, k, v, layout)
    return layout.attend(q, k, v)
