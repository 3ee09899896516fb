"""The results of scoring: of one conversation, and of two responses to a prompt."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import scipy

from rmjax.models.rewards.spec import Temperature


@dataclasses.dataclass(frozen=True, repr=False)
class Score:
    """The score of one conversation.

    Attributes:
      attributes: one number an attribute, on the scale of the ratings the model was trained on.
      value: the scalar reward, by `rule`. NaN for a model of general preferences, whose numbers
        only mean something when compared with those of another response.
      rule: an attribute, a published vector's name, the weights, or `general_preference`.
      tokens: length of the templated conversation.
      cut: tokens cut away in front of these, with `over_long="truncate_left"`.
    """

    attributes: dict[str, float]
    value: float
    rule: str
    tokens: int
    cut: int = 0

    def __repr__(self) -> str:
        width = _width(self.attributes)
        lines = [f"{name:<{width}} {value:8.4f}" for name, value in self.attributes.items()]
        value = _shown(self.value)
        lines.append(f"{'value':<{width}} {value:>8}   ({self.rule}; {self.tokens} tokens)")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Two responses to one prompt.

    Attributes:
      a: score of the first.
      b: score of the second.
      margin: value of `a` minus value of `b`; of general preferences, how much more `a` is
        preferred (`GeneralPreference`).
      temperature: turns the margin into a probability; None where the model has none for `a.rule`.
    """

    a: Score
    b: Score
    margin: float
    temperature: Temperature | None = None

    @property
    def preferred(self) -> str:
        """`"a"`, `"b"`, or `"tie"` where the margin is 0."""
        return "a" if self.margin > 0 else "b" if self.margin < 0 else "tie"

    @property
    def probability(self) -> float | None:
        """Probability that `a` is preferred: sigmoid(margin / T); None where no T was fitted."""
        if self.temperature is None:
            return None
        return float(scipy.special.expit(self.margin / self.temperature.value))

    def __repr__(self) -> str:
        rows = [("", "a", "b", "a - b")]
        pairs = {n: (v, self.b.attributes[n]) for n, v in self.a.attributes.items()}
        rows += [(n, f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}") for n, (a, b) in pairs.items()]
        rows.append(("value", _shown(self.a.value), _shown(self.b.value), f"{self.margin:+.4f}"))
        width = _width(pairs)
        lines = [f"{n:<{width}} {a:>8} {b:>8} {d:>8}" for n, a, b, d in rows]
        lines.append(f"preferred: {self.preferred}   (value: {self.a.rule})")
        if self.temperature:
            fitted = f"T = {self.temperature.value:.3g}, fitted on {self.temperature.pairs:,}"
            lines.append(f"P(a) = {self.probability:.3f}   ({fitted} held-out pairs)")
        return "\n".join(lines)


def _shown(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.4f}"


def _width(names: Iterable[str]) -> int:
    return max([16, *map(len, names)])


@dataclasses.dataclass
class Work:
    """What a scorer has computed so far.

    Attributes:
      conversations: different ones.
      tokens: theirs, each alone.
      computed: tokens computed, prefixes that responses to a prompt share once.
      padded_tokens: token positions computed, padding included.
    """

    conversations: int = 0
    tokens: int = 0
    computed: int = 0
    padded_tokens: int = 0
