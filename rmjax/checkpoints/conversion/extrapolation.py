"""ExPO: weights on the line from an earlier model through a later one, and beyond it.

Zheng et al., "Model Extrapolation Expedites Alignment", arXiv 2404.16792: a little training moves
the weights a little in a good direction, so go further in it. HelpSteer2-Preference (arXiv
2410.01257) does so with reward models, from one that regresses on helpfulness through the one that
scaled Bradley-Terry training makes of it, head included.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from rmjax.checkpoints.hf_weights import Weights
from rmjax.checkpoints.pretrained import Pretrained, open_pretrained, public_name
from rmjax.data.tokenizer import Tokenizer, differences
from rmjax.errors import UserError, differing
from rmjax.models.rewards.spec import RewardSpec

_Array = TypeVar("_Array", np.ndarray, jax.Array)
# Fields of a config that change no number of a reward model.
_IDLE = ("initializer_range", "tie_word_embeddings")


def extrapolated(weak: _Array, strong: _Array, alpha: float) -> _Array:
    """`weak + alpha * (strong - weak)`, of numpy's arrays or JAX's.

    Computed in float32 (float64 if one of the two is), and from whichever of the two is nearer,
    since a shorter step rounds less. `alpha` 0 and 1 give the two themselves to the bit, and
    numbers that are equal in both stay as they are.

    Args:
      weak: any shape, any floating type.
      strong: of the same shape.
      alpha: 0 is `weak`, 1 is `strong`.
    """
    # Float32 first: numpy knows no common type of bfloat16 and float16.
    dtypes = (np.dtype(np.float32), weak.dtype, strong.dtype)
    dtype = functools.reduce(np.promote_types, dtypes)
    weak, strong = weak.astype(dtype), strong.astype(dtype)
    start, factor = (strong, alpha - 1) if alpha > 0.5 else (weak, alpha)
    if factor == 0:  # adding 0 would turn -0 into 0
        return start
    result = strong - weak
    result *= dtype.type(factor)  # in place, if the array can
    result += start
    return result


class ExtrapolatedWeights:
    """Tensors on the line through those of two checkpoints, computed as they are read.

    They have the dtypes of the strong model and are rounded to nearest, ties to even.

    Attributes:
      compared: whether anything was read so far.
      differ: whether any number that was read differs between the two.
    """

    def __init__(self, weak: Weights, strong: Weights, alpha: float):
        self.where = strong.where
        self.compared = self.differ = False
        self._weak, self._strong, self._alpha = weak, strong, alpha

    def keys(self) -> set[str]:
        return self._weak.keys() & self._strong.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._strong.shape(key)

    def dtype(self, key: str) -> np.dtype:
        return self._strong.dtype(key)

    def read(self, key: str, index: Sequence[slice] = ()) -> np.ndarray:
        weak, strong = self._weak.read(key, index), self._strong.read(key, index)
        self.compared = True
        # The first block almost always decides it. Threads only ever set it to True.
        if not self.differ and not np.array_equal(weak, strong):
            self.differ = True
        return extrapolated(weak, strong, self._alpha).astype(self.dtype(key), copy=False)

    def files(self) -> list[Path]:
        return [*self._weak.files(), *self._strong.files()]


@dataclasses.dataclass(frozen=True)
class Parents:
    """Two models whose weights can be extrapolated.

    Attributes:
      weak: the earlier one.
      strong: the one that was trained from it.
      spec: of `strong`.
      tokenizer: of both.
    """

    weak: Pretrained
    strong: Pretrained
    spec: RewardSpec
    tokenizer: Tokenizer

    def child(self, alpha: float, chosen_on: str = "") -> RewardSpec:
        """The spec of the model at `alpha`, which was chosen on the pairs `chosen_on`, if any."""
        weak, strong = public_name(self.weak.name), public_name(self.strong.name)
        source = f"{weak} + {alpha!r} * ({strong} - {weak})"
        if chosen_on:
            source += f", {alpha!r} chosen on {public_name(chosen_on)}"
        return dataclasses.replace(
            self.spec, source=source, temperature=None, offset=self._offset(alpha)
        )

    def _offset(self, alpha: float) -> dict[str, float] | None:
        """What is added to the head's numbers lies on the line that the weights lie on."""
        ends = [
            (source.spec.offset if source.spec else None) or {}
            for source in (self.weak, self.strong)
        ]
        offset = {
            name: (1 - alpha) * ends[0].get(name, 0.0) + alpha * ends[1].get(name, 0.0)
            for name in self.spec.attributes
        }
        return offset if any(offset.values()) else None


def open_parents(weak: str, strong: str) -> Parents:
    """Opens two models: runs, Orbax models, or Hugging Face directories or hub ids with a head.

    Raises:
      UserError: one is no complete model or has no head, or they differ in architecture,
        attributes or tokenizer.
    """
    first, second = _open(weak), _open(strong)
    if other := [
        f"{name} is {a!r} and {b!r}"
        for name, (a, b) in differing(vars(first.decoder), vars(second.decoder)).items()
        if name not in _IDLE
    ]:
        raise UserError(f"{weak} and {strong} are of different architectures: {', '.join(other)}")
    attributes = [source.spec.attributes for source in (first, second) if source.spec]
    if attributes[0] != attributes[1]:
        raise UserError(
            f"{weak} and {strong} have heads for different attributes: "
            f"{', '.join(attributes[0])}; and {', '.join(attributes[1])}. The second must have "
            "been trained from the first with its head kept"
        )
    questions = [source.spec.suffix_turn for source in (first, second) if source.spec]
    if questions[0] != questions[1]:
        raise UserError(f"{weak} and {strong} answer different questions: {questions}")
    tokenizer = second.tokenizer()
    if parts := differences(first.tokenizer(), tokenizer):
        raise UserError(
            f"{weak} and {strong} have different tokenizers ({', '.join(parts)}): a conversation "
            "is not the same tokens to both"
        )
    assert second.spec is not None  # checked by _open
    return Parents(first, second, second.spec, tokenizer)


def check_alpha(alpha: float) -> float:
    """The `alpha` given; raises a `UserError` if it is not finite, in float32 too."""
    if not abs(alpha) <= float(np.finfo(np.float32).max):
        raise UserError(f"alpha = {alpha}: expected a finite number; 0 is WEAK, 1 is STRONG")
    return alpha


def _open(name: str) -> Pretrained:
    source = open_pretrained(name)
    if source.spec is None:
        raise UserError(
            f"{name}: a causal model without a reward head, so there is none to extrapolate; give "
            "two reward models, the second trained from the first"
        )
    if source.lora.rank:  # products of two matrices do not lie on a line
        raise UserError(
            f"{name}: trained with LoRA; merge its adapters first, with `python -m rmjax.convert "
            "orbax-to-hf`"
        )
    if source.spec.ordinal:  # extrapolated thresholds need not be in ascending order
        raise UserError(
            f"{name}: has thresholds of an ordinal objective, which are not extrapolated; give "
            "models that were trained by regression or on pairs alone"
        )
    return source
