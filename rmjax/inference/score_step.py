"""The compiled functions that score rows, and their use on whole data sets."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from rmjax.data.batch import Batch, PolicyTargets
from rmjax.data.batches import Batches
from rmjax.data.predicted import of_tokens
from rmjax.models.heads import LanguageModelHead, RewardHead
from rmjax.models.inputs import ROWS_AXES, Rows
from rmjax.models.log_probabilities import sums_of_samples
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.runtime.in_flight import in_flight
from rmjax.runtime.sharding import Sharding, put

ScoreFn = Callable[..., jax.Array]  # of the parameters, rows, and a policy's places


def make_score(model: Model) -> ScoreFn:
    """The function that scores rows, whole on every process; all of rmjax scores with it.

    It takes parameters and rows; of a language model the places that predict a token of a response,
    too, and its scores are those of `response_scores`.
    """

    def score(params: Params, rows: Rows, *places: Bool[Array, "B L"]) -> jax.Array:
        if isinstance(model.head, LanguageModelHead):
            return response_scores(model, params, rows, *places)
        return model(params, rows)

    return _whole_everywhere(model, score)


def response_scores(
    model: Model,
    params: Params,
    rows: Rows,
    places: Bool[Array, "B L"],
    dropout: jax.Array | None = None,
) -> Float32[Array, "B S 1"]:
    """The log-probability of each sample's response, as the only column of a score.

    Args:
      model: a language model.
      params: its parameters.
      rows: the samples.
      places: that predict a token of a response; see `data/predicted.py`.
      dropout: the key of LoRA's dropout; None for none.
    """
    found = model.log_probabilities(params, rows, places, dropout)
    return sums_of_samples(found.tokens, rows)[..., None]


TokenScoreFn = Callable[..., tuple[jax.Array, ...]]


def make_token_scores(model: Model) -> TokenScoreFn:
    """The function that says what a model thinks of tokens, whole on every process.

    It takes parameters, rows and the places [B, L] before the tokens. At these places it returns,
    [B, L] each, of a language model log-probabilities and the entropies of what the tokens were
    drawn from; of a critic its values.
    """

    def score(params: Params, rows: Rows, places: Bool[Array, "B L"]) -> tuple[Any, ...]:
        if isinstance(model.head, RewardHead):
            return (jnp.where(places, model(params, rows)[..., 0], 0.0),)
        found = model.log_probabilities(params, rows, places)
        return found.tokens, found.entropy

    return _whole_everywhere(model, score)


def score_tokens(
    score: TokenScoreFn, params: Params, batches: Batches, sharding: Sharding
) -> list[Float32[np.ndarray, "T"]]:
    """What `score` says of each of the data's tokens, 0 of those that the assistant does not say.

    Args:
      score: from `make_token_scores`.
      params: the model's.
      batches: hold each sample once, in one micro-batch a step; see `evaluation_batches`.
      sharding: the mesh.
    """
    data = batches.data
    known: list[np.ndarray] = []

    def compute(batch: Batch) -> tuple[Batch, Rows, list[np.ndarray]]:
        assert isinstance(batch.targets, PolicyTargets)
        rows, places = jax.tree.map(
            lambda x: x[0], (batch.rows, batch.targets.responses.predicting)
        )
        placed = put(rows, ROWS_AXES, sharding), put(places, ("row", "length"), sharding)
        return batch, rows, [np.asarray(found) for found in score(params, *placed)]

    for batch, rows, found in in_flight(compute, _each(batches), sharding.mesh):
        known = known or [np.zeros(len(data.tokens), np.float32) for _ in found]
        for numbers, values in zip(found, known):
            of_tokens(numbers, np.asarray(batch.samples[0]), rows, data, values)
    return known


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
    found = list(score_batches(score, params, _each(batches), sharding))
    scores = np.full((len(batches.data), found[0][1].shape[1]), np.nan, np.float32)
    for samples, values in found:
        scores[samples] = values
    return scores[batches.data.computed_as]


def score_batches(
    score: ScoreFn, params: Params, batches: Iterable[Batch], sharding: Sharding
) -> Iterator[tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n A"]]]:
    """The samples of each batch of one micro-batch, and their scores."""

    def compute(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        return score_batch(score, params, batch, sharding)

    return in_flight(compute, batches, sharding.mesh)


def _each(batches: Batches) -> Iterator[Batch]:
    return (batches[step] for step in range(len(batches)))


def score_batch(
    score: ScoreFn, params: Params, batch: Batch, sharding: Sharding
) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n A"]]:
    """The samples of a batch of one micro-batch, and their scores."""
    rows, targets = jax.tree.map(lambda x: x[0], (batch.rows, batch.targets))
    arrays: list[Any] = [put(rows, ROWS_AXES, sharding)]
    if isinstance(targets, PolicyTargets):
        arrays.append(put(targets.responses.predicting, ("row", "length"), sharding))
    scores = np.asarray(score(params, *arrays))
    samples = np.asarray(batch.samples[0])
    return samples[samples >= 0], scores[samples >= 0]


def _whole_everywhere(model: Model, function: Callable[..., Any]) -> Callable[..., Any]:
    replicated = model.options.sharding.replicated
    return jax.jit(
        function, out_shardings=replicated, compiler_options=compiler_options(replicated.mesh)
    )
