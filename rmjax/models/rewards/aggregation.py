"""From attributes to one number of each response to a prompt: a named rule, never a hidden one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32, Float64

from rmjax.errors import UserError, shortened
from rmjax.models.rewards.spec import LARGEST_WEIGHT, RewardSpec, is_weight
from rmjax.runtime.json_object import parse_object

# Weights that were published for HelpSteer2's attributes. The two RewardBench vectors were searched
# on that benchmark itself (model cards of Llama3-70B-SteerLM-RM and Nemotron-4-340B-Reward); the
# third is the one those cards used for DPO and PPO.
PUBLISHED: dict[str, dict[str, float]] = {
    "llama3_70b_rewardbench": {
        "helpfulness": 0.65,
        "correctness": 0.8,
        "coherence": 0.45,
        "complexity": 0.55,
        "verbosity": -0.4,
    },
    "nemotron4_340b_rewardbench": {
        "helpfulness": 0.3,
        "correctness": 0.74,
        "coherence": 0.46,
        "complexity": 0.47,
        "verbosity": -0.33,
    },
    "goodness": {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45},
}
# The benchmark that a vector was fitted on: its score there is too high.
FITTED_ON = {
    "llama3_70b_rewardbench": "reward-bench",
    "nemotron4_340b_rewardbench": "reward-bench",
}


class Rule(Protocol):
    """How a model's scores become what responses to a prompt are ordered by."""

    @property
    def name(self) -> str:
        """An attribute, a published vector's name, the weights, or `general_preference`."""
        ...

    def values(self, scores: Float[np.ndarray, "... n A"]) -> Float64[np.ndarray, "... n"]:
        """A number for each of the n responses to a prompt, from their scores; see each rule.

        Of two responses the difference is the margin.
        """
        ...


class ScalarRule(NamedTuple):
    """A weighted sum of a model's attributes, without an offset.

    Attributes:
      name: see `Rule`.
      weights: by attribute.
      attributes: of the model, in order.
    """

    name: str
    weights: dict[str, float]
    attributes: tuple[str, ...]

    def values(self, scores: Float[np.ndarray, "... n A"]) -> Float64[np.ndarray, "... n"]:
        """The weighted sums; other responses do not matter."""
        return scores.astype(np.float64) @ self.vector(self.attributes).astype(np.float64)

    def vector(self, attributes: Sequence[str]) -> Float32[np.ndarray, "A"]:
        """One weight an attribute, in order; 0 where the rule names none."""
        return np.asarray([self.weights.get(name, 0.0) for name in attributes], np.float32)


def model_rule(spec: RewardSpec, value: str | Mapping[str, float] | None = None) -> Rule:
    """A model's own rule, or the one that `value` names; see `scalar_rule`.

    Raises:
      UserError: the model does not have it.
    """
    if spec.general_preference is None:
        if value is None and not spec.scalar:
            _ask_for_value(spec.attributes)
        return scalar_rule(spec.scalar if value is None else value, spec.attributes)
    if value is not None:
        raise UserError(
            f"value = {value!r}: this is a model of general preferences, which compares two "
            "responses and has no number for one; leave value out"
        )
    return spec.general_preference


def _ask_for_value(labels: Sequence[str]) -> None:
    example = ", ".join(f'"{name}": {-1 if i == 0 else 1}' for i, name in enumerate(labels[:2]))
    raise UserError(
        f"the model is a classifier ({', '.join(labels)}) and does not say which label is good: "
        f"give value, a label or weights; {{{example}}} is the difference of two logits, with "
        f"{labels[1]!r} as the good one. (On the command line: --value)"
    )


def fold_spec(spec: RewardSpec, rule: ScalarRule) -> RewardSpec:
    """The spec of a head whose one output is a model's value, called by the rule's name.

    A value is a linear function of the last hidden state, and so is such a head's output.

    Raises:
      UserError: the rule is of expected ratings, which are no linear function of it.
    """
    ordinal = spec.ordinal.attributes if spec.ordinal else ()
    if curved := [name for name, weight in rule.weights.items() if name in ordinal and weight]:
        raise UserError(
            f"value {rule.name!r}: the value of {curved[0]!r} is an expected rating, by thresholds "
            "behind the head, and no weighted sum of the head's outputs is that; leave value out"
        )
    offset = sum(rule.weights.get(name, 0.0) * x for name, x in (spec.offset or {}).items())
    before = spec.folded or {}  # of the only attribute, so that one weight is left
    scale = next(iter(rule.weights.values()))
    temperature = spec.temperature
    return dataclasses.replace(
        spec,
        attributes=(rule.name,),
        scalar={rule.name: 1.0},
        offset={rule.name: offset} if offset else None,
        ordinal=None,
        temperature=temperature if temperature and temperature.rule == rule.name else None,
        folded={name: weight * scale for name, weight in before.items()} or dict(rule.weights),
    )


def parse_rule(text: str) -> str | dict[str, float]:
    """A rule from a command line: a name, or weights as a JSON mapping.

    Raises:
      UserError: broken JSON, or a name that is there twice.
    """
    if not text.lstrip().startswith("{"):
        return text
    return parse_object(text, f"--value={shortened(text, 200)}")


def scalar_rule(rule: str | Mapping[str, float], attributes: Sequence[str]) -> ScalarRule:
    """Reads a rule: an attribute's name, a published vector's name, or weights by attribute.

    Raises:
      UserError: it names something that the model does not have.
    """
    if isinstance(rule, str):
        if rule in attributes:
            return ScalarRule(rule, {rule: 1.0}, tuple(attributes))
        if rule not in PUBLISHED:
            raise UserError(
                f"scalar rule {rule!r}: neither an attribute ({', '.join(attributes)}) nor a "
                f"published vector ({', '.join(PUBLISHED)})"
            )
        name, weights = rule, dict(PUBLISHED[rule])
    else:
        weights = _weights(rule)
        if list(weights.values()) == [1.0]:  # one attribute as it is: a model's own rule
            (name,) = weights
        else:
            name = " ".join(f"{value:+g}*{key}" for key, value in weights.items())
    unknown = [key for key in weights if key not in attributes]
    if unknown:
        raise UserError(
            f"scalar rule {name!r}: the model has no attribute {unknown[0]!r}; "
            f"it has {', '.join(attributes)}"
        )
    return ScalarRule(name, weights, tuple(attributes))


def _weights(rule: object) -> dict[str, float]:
    """The weights of a rule that is no name; a `UserError` if they make no value of anything."""
    said = f"scalar rule {shortened(repr(rule), 200)}"
    if not isinstance(rule, Mapping):
        raise UserError(f"{said}: expected a name, or attributes with weights")
    for key, value in rule.items():
        if not is_weight(value):
            raise UserError(
                f"{said}: the weight of {key!r} is {shortened(repr(value))}, expected a number "
                f"below {LARGEST_WEIGHT:g}"
            )
    weights = {key: float(value) for key, value in rule.items()}
    if not any(map(np.float32, weights.values())):  # whose precision a head has
        raise UserError(f"{said}: expected attributes, and a weight that is not 0")
    return weights
