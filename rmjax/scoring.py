"""Scores of a whole data set, exact whatever the last batch holds."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float32

from rmjax.data.batches import Batches, put
from rmjax.errors import UserError
from rmjax.metrics import (
    AttributeMetrics,
    attribute_metrics,
    bradley_terry_loss,
    pair_metrics,
    validation_loss,
)
from rmjax.parameters import Params
from rmjax.rows import ROWS_AXES, Rows
from rmjax.sharding import Sharding

Score = Callable[[Params, Rows], jax.Array]


def score_data(
    score: Score, params: Params, batches: Batches, sharding: Sharding
) -> Float32[np.ndarray, "N A"]:
    """Scores of every sample of `batches`, which hold each once, in the data's order.

    Args:
      score: from `step.make_score`.
      params: the model's.
      batches: from `data.batches.evaluation_batches`.
      sharding: the mesh.
    """
    data = batches.data
    scores = np.full((len(data), len(data.attributes)), np.nan, np.float32)
    for batch in map(batches.__getitem__, range(len(batches))):
        rows = jax.tree.map(lambda x: x[0], batch.rows)
        found = np.asarray(score(params, put(rows, ROWS_AXES, sharding)))
        samples = np.asarray(batch.samples[0])
        scores[samples[samples >= 0]] = found[samples >= 0]
    return scores


def evaluate(
    score: Score,
    params: Params,
    batches: Batches,
    constants: Float32[np.ndarray, "A"],
    sharding: Sharding,
) -> tuple[float, dict[str, AttributeMetrics]]:
    """Validation loss and the metrics of each attribute, or of the reward, on held-out data.

    Args:
      score: from `step.make_score`.
      params: the model's.
      batches: from `data.batches.evaluation_batches`.
      constants: mean rating of each attribute in the training data.
      sharding: the mesh.

    Raises:
      UserError: a score is not finite; it names the sample.
    """
    data = batches.data
    scores = score_data(score, params, batches, sharding)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise UserError(
            f"the scores of {len(bad)} held-out samples are not finite, the first of them "
            f"{data.where(int(bad[0]))}; nothing was saved"
        )
    if data.pairs:
        margins = scores[::2, 0].astype(np.float64) - scores[1::2, 0]
        return bradley_terry_loss(margins), {data.attributes[0]: pair_metrics(margins)}
    table = attribute_metrics(data.attributes, scores, data.labels, data.groups, constants)
    return validation_loss(scores, data.labels), table
