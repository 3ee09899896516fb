"""What a reward model's outputs are."""

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from rmjax.errors import UserError, shortened
from rmjax.models.decoder_config import NO_LORA, LoraConfig
from rmjax.models.rewards.general_preference import GeneralPreference
from rmjax.models.rewards.ordinal import OrdinalScale

LARGEST_WEIGHT = 1e30  # of an output in a sum of them; NaN is not below it


@dataclasses.dataclass(frozen=True)
class Temperature:
    """What makes margins probabilities: sigmoid(margin / value), as fitted on held-out pairs.

    Attributes:
      value: T.
      rule: name of the rule whose margins it is for; see `aggregation.Rule`.
      pairs: on how many it was fitted.
    """

    value: float
    rule: str
    pairs: int


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """Contents of `rmjax.json`.

    Attributes:
      attributes: names of the head's outputs, in order.
      scalar: weights by attribute of the scalar reward; none of a model of general preferences,
        and none of a classifier, whose labels do not say which of them is the reward.
      max_length: most tokens of a sample in training; 0 if the model was not trained here.
      seed: of the head or of all weights; None if the weights came with a head.
      source: what the weights were made from.
      data: fingerprint of the training data; empty if there was none.
      lora: adapters that are kept beside the weights.
      offset: constants by attribute that are added to the head's numbers, from a value head with a
        bias; None for none.
      ordinal: how the head's numbers are read as ratings; None where they are these themselves.
      general_preference: how two responses' numbers are compared, where they have no order.
      temperature: of its margins; None if it was not fitted.
      suffix_turn: what a user asks after the response; the reward is read where the answer would
        begin. Empty where it is read at the response's end.
      folded: of a head that is the value of another, the weights by which that one's outputs were
        summed; None for any other head.
    """

    attributes: tuple[str, ...]
    scalar: dict[str, float]
    max_length: int = 0
    seed: int | None = None
    source: str = ""
    data: str = ""
    lora: LoraConfig = NO_LORA
    offset: dict[str, float] | None = None
    ordinal: OrdinalScale | None = None
    general_preference: GeneralPreference | None = None
    temperature: Temperature | None = None
    suffix_turn: str = ""
    folded: dict[str, float] | None = None

    def read(self, numbers: Float[np.ndarray, "N A"]) -> Float64[np.ndarray, "N A"]:
        """The attributes' values: the head's numbers, with offsets and on the ratings' scale."""
        offset = self.offset or {}
        scores = numbers.astype(np.float64) + [offset.get(name, 0.0) for name in self.attributes]
        return self.ordinal.read(scores, self.attributes) if self.ordinal else scores


def is_weight(value: object) -> bool:
    """Whether a value may be what an output is multiplied by."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return -LARGEST_WEIGHT < float(value) < LARGEST_WEIGHT
    except OverflowError:  # JSON's whole numbers have no largest
        return False


def check_names(names: Sequence[str], where: str) -> None:
    """Raises a `UserError` unless every output has a name of its own that fits on a line."""
    if not names:
        raise UserError(f"{where}: expected names, separated by a comma each")
    for number, name in enumerate(names):
        if name.strip() != name or not name or not name.isprintable():
            raise UserError(
                f"{where}: {shortened(repr(name))} is no name of an output; expected letters on "
                "one line, without spaces around them"
            )
        if name in names[:number]:
            raise UserError(f"{where}: the name {shortened(name)!r} is there twice")
