"""Loss and metrics on held-out data."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rmjax.data.batch import PolicyTargets, Targets
from rmjax.data.batches import Batches, all_samples, make_policy_targets, make_targets
from rmjax.data.tokenized import TokenizedData
from rmjax.errors import UserError
from rmjax.evaluation.metrics import (
    AttributeMetrics,
    PairMetrics,
    PolicyMetrics,
    attribute_metrics,
    pair_metrics,
    policy_metrics,
)
from rmjax.inference.score_step import ScoreFn, score_data
from rmjax.models.parameters import THRESHOLDS, Params
from rmjax.models.rewards.aggregation import Rule, scalar_rule
from rmjax.models.rewards.ordinal import OrdinalScale
from rmjax.runtime.sharding import Sharding
from rmjax.training.objectives.objective import Objective
from rmjax.training.objectives.policies import implicit_rewards


class ValidationMetrics(NamedTuple):
    """A model's metrics on held-out data.

    Attributes:
      loss: the objective's value.
      attributes: the metrics of each rated attribute.
      pairs: the metrics of preference pairs; None without pairs.
      policy: what a policy says of the responses; None of a reward model.
    """

    loss: float
    attributes: dict[str, AttributeMetrics]
    pairs: PairMetrics | None
    policy: PolicyMetrics | None = None

    def record(self) -> dict[str, Any]:
        """The metrics in JSON's types, for a checkpoint: None for NaN."""
        rated = {name: _plain(row) for name, row in self.attributes.items()}
        pairs = _plain(self.pairs) if self.pairs else None
        policy = {"policy": _plain(self.policy)} if self.policy else {}
        return {"validation_loss": self.loss, "attributes": rated, "pairs": pairs} | policy


def _plain(metrics: Any) -> dict[str, Any]:
    return {k: None if v != v else v for k, v in dataclasses.asdict(metrics).items()}


def evaluate(
    score: ScoreFn,
    params: Params,
    batches: Batches,
    constants: Float[np.ndarray, "A"],
    objective: Objective,
    sharding: Sharding,
) -> ValidationMetrics:
    """Scores held-out data and computes loss and metrics.

    Args:
      score: from `inference.score_step.make_score`.
      params: of the model.
      batches: from `inference.batching.evaluation_batches`.
      constants: mean rating of each attribute in the training data.
      objective: whose value is the loss.
      sharding: the mesh.

    Raises:
      UserError: a score is not finite; it names the sample.
    """
    scores = score_data(score, params, batches, sharding)
    return validation_metrics(scores, batches.data, constants, objective, params)


def validation_metrics(
    scores: Float32[np.ndarray, "N A"],
    data: TokenizedData,
    constants: Float[np.ndarray, "A"],
    objective: Objective,
    params: Params | None = None,
) -> ValidationMetrics:
    """Computes loss and metrics from scores, one row for each sample in the data's order.

    Of the parameters only the thresholds are used, if the objective has any.
    """
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise UserError(
            f"the scores of {len(bad)} held-out samples are not finite, the first of them "
            f"{data.where(int(bad[0]))}; nothing was saved"
        )
    loss = objective_value(objective, scores, data, params)
    if not np.isfinite(loss):
        raise UserError(
            f"the loss of {len(data)} held-out samples is {loss}, though their scores are finite; "
            "nothing was saved: lower config.optimizer.learning_rate, or look at their labels"
        )
    if objective.policy:
        return _of_policy(loss, objective, scores, data)
    ratings = _as_ratings(objective, scores, params, constants, data.attributes)
    rated = {
        name: row
        for name, row in attribute_metrics(
            data.attributes, ratings, data.labels, data.prompt_ids, constants
        ).items()
        if row.count
    }
    first = np.flatnonzero(data.chosen)
    pairs = None
    if len(first):
        rule = _pair_rule(objective, data.attributes)
        values = rule.values(np.stack([ratings[first], ratings[first + 1]], axis=1))
        pairs = _pair_metrics(rule.name, values, data, first)
    return ValidationMetrics(loss, rated, pairs)


def _of_policy(
    loss: float, objective: Objective, scores: Float32[np.ndarray, "N 1"], data: TokenizedData
) -> ValidationMetrics:
    """What a policy says of the responses and, of pairs, metrics of its implicit rewards."""
    responses = _policy_targets(data).responses
    first, logs = np.flatnonzero(data.chosen), scores[:, 0]
    reference = np.asarray(responses.reference[0]) if objective.reference else None
    rewards = pairs = None
    if objective.pairs:
        found = implicit_rewards(
            jnp.asarray(scores[None]), responses, objective.beta, objective.reference
        )
        rewards = np.asarray(found)[0, :, 0]
        values = np.stack([rewards[first], rewards[first + 1]], axis=1)
        pairs = _pair_metrics("implicit reward", values, data, first)
    decided = first[data.strengths[first] != 0]
    both = np.stack([decided, decided + 1], axis=1)
    lengths = np.asarray(responses.lengths[0])
    policy = policy_metrics(logs, lengths, reference, rewards, both)
    return ValidationMetrics(loss, {}, pairs, policy)


def _policy_targets(data: TokenizedData) -> PolicyTargets:
    """Of all samples at once, in a row of no places: no loss looks at these."""
    samples, members, pairs = all_samples(data)
    return make_policy_targets(data, samples, np.zeros((1, 0), bool), members, pairs)


def _pair_metrics(
    name: str,
    values: Float[np.ndarray, "P 2"],
    data: TokenizedData,
    first: Int[np.ndarray, "P"],
) -> PairMetrics:
    """Metrics of what the two samples of each pair are worth; `first` are the chosen ones."""
    lengths = np.stack([data.lengths[first], data.lengths[first + 1]], axis=1)
    return pair_metrics(name, values[:, 0], values[:, 1], data.strengths[first], lengths)


def _pair_rule(objective: Objective, attributes: tuple[str, ...]) -> Rule:
    """How the scores of a pair become two values."""
    return objective.general or scalar_rule(attributes[objective.column], attributes)


def _as_ratings(
    objective: Objective,
    scores: Float32[np.ndarray, "N A"],
    params: Params | None,
    constants: Float[np.ndarray, "A"],
    attributes: tuple[str, ...],
) -> Float[np.ndarray, "N A"]:
    """The scores as users see them: expected ratings, where an ordinal objective has levels."""
    if not objective.levels:
        return scores
    assert params is not None
    rated = tuple(name for name, mean in zip(attributes, constants) if np.isfinite(mean))
    scale = OrdinalScale(*objective.levels, rated)
    return scale.with_raw(np.asarray(params[THRESHOLDS.path]), attributes).read(scores, attributes)


def objective_value(
    objective: Objective,
    scores: Float32[np.ndarray, "N A"],
    data: TokenizedData,
    params: Params | None = None,
) -> float:
    """The objective over all samples at once; of `params` only the thresholds are used."""
    rated = make_targets(data, *all_samples(data)) if not objective.policy else None
    targets = rated or _policy_targets(data)
    # A copy on this process's default device, whatever mesh the thresholds are on.
    paths = [row.path for row in objective.parameters]
    own = {path: jnp.asarray(np.asarray((params or {})[path])) for path in paths}
    return float(_value(objective, scores[None], targets, own))


@functools.partial(jax.jit, static_argnums=0)
def _value(
    objective: Objective,
    scores: Float32[Array, "1 N A"],
    targets: Targets | PolicyTargets,
    params: Params,
) -> jax.Array:
    """One program; a small one for each of its operations takes a second to compile."""
    return objective.loss(scores, targets, objective.weights(targets), params)
