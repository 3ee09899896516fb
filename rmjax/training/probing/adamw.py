"""The head trained on features that are there: a run's own recipe without the run's model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int64

from rmjax.config import EVERYTHING, Config
from rmjax.data.batch import Batch
from rmjax.data.batches import Members, make_targets
from rmjax.data.planning import plan_steps
from rmjax.data.tokenized import TokenizedData
from rmjax.errors import UserError
from rmjax.models.heads import RewardHead
from rmjax.models.layers import ModelOptions
from rmjax.models.model import Model
from rmjax.models.parameters import Parameter, Params
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.experiment import config_objective
from rmjax.training.step import make_program


class Trained(NamedTuple):
    """A head and how it came about.

    Attributes:
      head: the best one by validation loss, else the last.
      step: after which it was so.
      steps: how many there were.
      losses: of each step.
    """

    head: Float32[np.ndarray, "D A"]
    step: int
    steps: int
    losses: Float64[np.ndarray, "T"]


def train_head(
    config: Config,
    model: Model,
    head: Float32[np.ndarray, "D A"],
    features: Float32[np.ndarray, "N D"],
    data: TokenizedData,
    validate: Callable[[int, np.ndarray], float] | None,
) -> Trained:
    """What `rmjax.train` with `trainable=("head",)` makes of the head: same steps, same numbers.

    Args:
      config: its optimizer, batch size, steps, objective and seed are taken, and `eval_every`.
      model: whose head it is.
      head: the first one.
      features: of the training samples.
      data: these samples.
      validate: the validation loss of a step's head; None without validation data.

    Raises:
      UserError: a loss is not finite.
    """
    plan = plan_steps(
        data,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        epochs=config.epochs,
    )
    program = make_program(
        HeadAlone(model.config, one_device(), model.head),
        config_objective(config),
        config.optimizer,
        steps=len(plan),
        trainable=EVERYTHING,
    )
    state = program.start({"head": jnp.asarray(head)})
    slots = max(map(len, plan))
    best, lowest, losses = (head, 0), np.inf, []
    for step, samples in enumerate(plan, start=1):
        state, metrics = program.step(state, _batch(features, data, samples, slots))
        losses.append(metrics.loss)
        last = step == len(plan)
        if not (last or (config.eval_every and validate and step % config.eval_every == 0)):
            continue
        finite = np.isfinite(np.asarray(losses))
        if not finite.all():
            raise UserError(
                f"step {finite.argmin() + 1}: the loss is not finite; lower "
                "config.optimizer.learning_rate"
            )
        now = np.asarray(state.params["head"])
        loss = validate(step, now) if validate else -np.inf
        if loss < lowest:
            best, lowest = (now, step), loss
    return Trained(*best, len(plan), np.asarray(losses, np.float64))


class HeadAlone(Model):
    """A model whose rows are features: what the decoder would give, computed before."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The head's."""
        return self.head.parameters

    def hidden(self, params: Params, rows: Any, dropout: jax.Array | None = None) -> jax.Array:
        """The features as they are."""
        return rows


def one_device() -> ModelOptions:
    """Of a program that is too small to divide."""
    return ModelOptions(Sharding(make_mesh(MeshConfig(), jax.local_devices()[:1])))


def _batch(
    features: np.ndarray, data: TokenizedData, samples: Int64[np.ndarray, "..."], slots: int
) -> Batch:
    """A step as one row of `slots` samples, their features in place of tokens."""
    row = np.full((1, slots), -1, np.int32)
    row[0, : len(samples)] = samples
    read = np.zeros((1, slots, features.shape[1]), np.float32)
    read[0, : len(samples)] = features[samples]
    members = [Members(samples, np.arange(len(samples)))]
    arrays = (read, make_targets(data, row, members, max(1, slots // 2)), row)
    return Batch(*jax.tree.map(lambda x: x[None], arrays), microbatches=np.int32(1))  # pyright: ignore[reportArgumentType]


def head_scores(
    features: Float32[np.ndarray, "N D"], head: Float32[np.ndarray, "D A"]
) -> Float32[np.ndarray, "N A"]:
    """What the head says of samples."""
    read = RewardHead(head.shape[1])
    return np.asarray(read({"head": jnp.asarray(head)}, jnp.asarray(features)[None]))[0]
