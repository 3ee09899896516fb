"""The compiled functions that score rows, and their use on whole data sets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from rmjax.data.batch import Batch
from rmjax.data.batches import Batches
from rmjax.models.inputs import ROWS_AXES, Rows
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.runtime.sharding import Sharding, put

ScoreFn = Callable[[Params, Rows], jax.Array]


def make_score(model: Model) -> Callable[[Params, Rows], Float32[Array, "B S A"]]:
    """The function that scores rows, whole on every process; all of rmjax scores with it."""
    return _whole_everywhere(model, model)


def make_features(model: Model) -> Callable[[Params, Rows], Float32[Array, "B S D"]]:
    """What the head reads of every slot, the last layer's normed states, whole on every process."""

    def features(params: Params, rows: Rows) -> jax.Array:
        return model.hidden(params, rows).astype(jnp.float32)

    return _whole_everywhere(model, features)


def score_data(
    score: ScoreFn, params: Params, batches: Batches, sharding: Sharding
) -> Float32[np.ndarray, "N A"]:
    """Scores of every sample, in the data's order.

    Args:
      score: from `make_score`.
      params: the model's.
      batches: hold each sample once, in one micro-batch a step; see `evaluation_batches`.
      sharding: the mesh.
    """
    data = batches.data
    scores = np.full((len(data), len(data.attributes)), np.nan, np.float32)
    for step in range(len(batches)):
        samples, values = score_batch(score, params, batches[step], sharding)
        scores[samples] = values
    return scores


def score_batch(
    score: ScoreFn, params: Params, batch: Batch, sharding: Sharding
) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n A"]]:
    """The samples of a batch of one micro-batch, and their scores."""
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    scores = np.asarray(score(params, put(rows, ROWS_AXES, sharding)))
    samples = np.asarray(batch.samples[0])
    return samples[samples >= 0], scores[samples >= 0]


def _whole_everywhere(
    model: Model, function: Callable[[Params, Rows], jax.Array]
) -> Callable[[Params, Rows], jax.Array]:
    replicated = model.options.sharding.replicated
    return jax.jit(
        function, out_shardings=replicated, compiler_options=compiler_options(replicated.mesh)
    )
