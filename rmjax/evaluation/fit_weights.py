"""Weights of the attributes fitted on preference pairs, with a record of the pairs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy

from rmjax.data.conversation import prompt_key
from rmjax.errors import UserError, write_errors
from rmjax.evaluation.benchmark_metrics import ScoredBenchmark
from rmjax.evaluation.items import Item
from rmjax.models.rewards.aggregation import parse_rule
from rmjax.runtime.files import BAD_JSON, replace_file
from rmjax.runtime.json_object import unique_keys

WEIGHTS_FORMAT = "rmjax.weights/1"
_RIDGE = 1e-3  # on standardised attributes: a weight that does not matter stays at 0


@dataclasses.dataclass(frozen=True)
class FittedWeights:
    """Weights and what they were fitted on.

    Attributes:
      weights: by attribute.
      source: of the pairs, as the user gave it.
      pairs: how many pairs there were.
      prompts: fingerprints of their prompts.
    """

    weights: Mapping[str, float]
    source: str
    pairs: int
    prompts: frozenset[str]

    def seen(self, items: Sequence[Item]) -> int:
        """How many of the items have a prompt that the weights were fitted on."""
        return sum(_prompt_key(item) in self.prompts for item in items)


def fit_weights(scored: ScoredBenchmark) -> FittedWeights:
    """Fits a logistic regression of preferences on differences of attributes, without intercept.

    It is Bradley-Terry with the attributes as features: sigmoid(weighted difference) is the
    probability of the preference. Every comparison of a good and a bad response counts the same.

    Args:
      scored: pairs, or lists of good and bad responses, with their scores.

    Raises:
      UserError: no two scores differ.
    """
    data, names = scored.data, scored.attributes
    differences = np.concatenate(
        [
            (s.scores[: item.good, None] - s.scores[None, item.good :]).reshape(-1, len(names))
            for item, s in zip(scored.items, scored.scores)
            if item.good
        ]
        or [np.zeros((0, len(names)))]
    )
    if not len(differences) or not differences.any():
        raise UserError(f"--fit={data.source}: no pair there whose scores differ")
    scale = np.sqrt((differences**2).mean(axis=0))
    features = differences / np.where(scale > 0, scale, 1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = features @ weights
        wrong = scipy.special.expit(-margins)
        value = np.logaddexp(0, -margins).mean() + _RIDGE * weights @ weights
        return value, -(wrong @ features) / len(features) + 2 * _RIDGE * weights

    minimum = scipy.optimize.minimize(loss, np.zeros(len(names)), jac=True, method="L-BFGS-B")
    weights = minimum.x / np.where(scale > 0, scale, 1.0)
    return FittedWeights(
        dict(zip(names, map(float, weights))),
        data.source,
        len(differences),
        frozenset(map(_prompt_key, scored.items)),
    )


def _prompt_key(item: Item) -> str:
    return hashlib.sha256(prompt_key(item.conversations).encode()).hexdigest()[:12]


def write_weights(path: Path, fitted: FittedWeights) -> None:
    """Writes the file that `--value` and `read_weights` read."""
    fields = dataclasses.asdict(fitted) | {"prompts": sorted(fitted.prompts)}
    with write_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": WEIGHTS_FORMAT} | fields, indent=1, allow_nan=False) + "\n"
        replace_file(path, text.encode())


def read_weights(path: Path) -> FittedWeights:
    """Reads a file that `write_weights` wrote.

    Raises:
      UserError: it cannot be read, or is another file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        if fields.pop("format") != WEIGHTS_FORMAT:
            raise ValueError("another format")
        weights = {str(k): float(v) for k, v in fields["weights"].items()}
        prompts = frozenset(map(str, fields["prompts"]))
        return FittedWeights(weights, str(fields["source"]), int(fields["pairs"]), prompts)
    except (OSError, *BAD_JSON) as error:
        raise UserError(
            f"{path}: not a file of weights as `--fit` writes it ({error!r})"
        ) from error


def parse_value(
    text: str | None,
) -> tuple[str | Mapping[str, float] | None, FittedWeights | None]:
    """`--value`: a name, a JSON mapping, or a file that `--fit` wrote, with what it says.

    Raises:
      UserError: broken JSON, or another file.
    """
    if text and text.endswith(".json"):
        fitted = read_weights(Path(text))
        return fitted.weights, fitted
    return (parse_rule(text) if text else None), None
