"""The head trained on features that are there: a run's own recipe without the run's model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float32, Float64, Int64

from rmjax.data.batch import Targets
from rmjax.data.batches import make_targets
from rmjax.data.planning import plan_steps
from rmjax.data.tokenized import TokenizedData
from rmjax.errors import UserError
from rmjax.models.reward_model import read_head
from rmjax.training.config import Config
from rmjax.training.experiment import config_objective
from rmjax.training.objectives.objective import Objective
from rmjax.training.optimizer import make_optimizer, make_schedule
from rmjax.training.step import Metrics, TrainState


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
    head: Float32[np.ndarray, "D A"],
    features: Float32[np.ndarray, "N D"],
    data: TokenizedData,
    validate: Callable[[int, np.ndarray], float] | None,
) -> Trained:
    """What `rmjax.train` with `trainable=("head",)` makes of the head: same steps, same numbers.

    Args:
      config: its optimizer, batch size, steps, objective and seed are taken, and `eval.every`.
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
    schedule = make_schedule(config.optimizer, len(plan))
    optimizer = make_optimizer(config.optimizer, schedule)
    train_step = make_head_step(config_objective(config), optimizer, schedule)
    params: Any = {"head": jnp.asarray(head)}
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    slots = max(map(len, plan))
    best, lowest, losses = (head, 0), np.inf, []
    for step, samples in enumerate(plan, start=1):
        state, metrics = train_step(state, *_batch(features, data, samples, slots))
        losses.append(metrics.loss)
        last = step == len(plan)
        if not (last or (config.eval.every and validate and step % config.eval.every == 0)):
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


def make_head_step(
    objective: Objective, optimizer: Any, schedule: Callable[[jax.Array], jax.Array]
) -> Callable[[TrainState, Any, Targets], tuple[TrainState, Metrics]]:
    """One step of the head, `step(state, features, targets)`, compiled once.

    As `step.make_train_step`, of features [1, S, D] in the place of rows.
    """

    def train_step(
        state: TrainState, features: Any, targets: Targets
    ) -> tuple[TrainState, Metrics]:
        def loss_of(params: Any) -> jax.Array:
            scores = read_head(features, params["head"])
            return objective.loss(scores, targets, objective.weights(targets))

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = Metrics(loss, optax.tree.norm(grads), jnp.asarray(schedule(state.step)))
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def _batch(
    features: np.ndarray, data: TokenizedData, samples: Int64[np.ndarray, "..."], slots: int
) -> tuple[Float32[np.ndarray, "1 S D"], Targets]:
    """A step as one row of `slots` samples."""
    row = np.full((1, slots), -1, np.int32)
    row[0, : len(samples)] = samples
    read = np.zeros((1, slots, features.shape[1]), np.float32)
    read[0, : len(samples)] = features[samples]
    return read, make_targets(data, row)


def head_scores(
    features: Float32[np.ndarray, "N D"], head: Float32[np.ndarray, "D A"]
) -> Float32[np.ndarray, "N A"]:
    """What the head says of samples."""
    return np.asarray(read_head(jnp.asarray(features)[None], jnp.asarray(head)))[0]
