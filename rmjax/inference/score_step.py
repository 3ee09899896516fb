"""Scores of rows, compiled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from rmjax.data.batches import Batches
from rmjax.models.inputs import ROWS_AXES, Rows
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.runtime.sharding import Sharding, put

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


def make_score(model: Model) -> Callable[[Params, Rows], Float32[Array, "B S A"]]:
    """Scores of rows, whole on every process: the one scoring function of REPL and trainer."""
    return _whole_everywhere(model, model)


def make_features(model: Model) -> Callable[[Params, Rows], Float32[Array, "B S D"]]:
    """What the head reads of every slot, the last layer's normed states, whole on every process."""

    def features(params: Params, rows: Rows) -> jax.Array:
        return model.hidden(params, rows).astype(jnp.float32)

    return _whole_everywhere(model, features)


def _whole_everywhere(
    model: Model, function: Callable[[Params, Rows], jax.Array]
) -> Callable[[Params, Rows], jax.Array]:
    replicated = model.options.sharding.replicated
    return jax.jit(
        function, out_shardings=replicated, compiler_options=compiler_options(replicated.mesh)
    )
