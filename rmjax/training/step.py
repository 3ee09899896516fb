"""The state of a run and its compiled step, assembled for training, probing and compile_check."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from rmjax.config import OptimizerConfig
from rmjax.data.batch import Batch, PolicyTargets, Rollouts
from rmjax.inference.score_step import response_scores
from rmjax.models.heads import LanguageModelHead
from rmjax.models.init import abstract_model
from rmjax.models.model import Model
from rmjax.models.parameters import Params
from rmjax.runtime.compilation import compiler_options
from rmjax.training.objectives.objective import Objective
from rmjax.training.optimizer import (
    abstract_opt_state,
    make_optimizer,
    make_schedule,
    merge,
    partition,
)

MICROBATCH_LOOP = "microbatches"  # the scope of the loop over them, in the program's text


class TrainState(NamedTuple):
    """Everything a step changes. Randomness, where needed, is `fold_in(seed, step)`."""

    step: Int32[Array, ""]
    params: Params
    opt_state: optax.OptState

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds, by name."""
        return {
            "params": self.params,
            "optimizer": {"step": self.step, "state": self.opt_state},
        }

    @classmethod
    def from_items(cls, items: dict[str, Any]) -> "TrainState":
        """The inverse of `items`."""
        optimizer = items["optimizer"]
        return cls(optimizer["step"], items["params"], optimizer["state"])


class Metrics(NamedTuple):
    """What a step reports; the gradient's norm is taken before clipping."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]


class Program(NamedTuple):
    """What a run computes with.

    Attributes:
      abstract: shapes, dtypes and shardings of the state, without any array.
      step: one optimizer step, compiled once; see `make_train_step`.
      start: from parameters, which are donated with it, to the state before the first step.
    """

    abstract: TrainState
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    start: Callable[[Params], TrainState]


def make_program(
    model: Model,
    objective: Objective,
    config: OptimizerConfig,
    *,
    steps: int,
    trainable: tuple[str, ...],
    seed: int = 0,
) -> Program:
    """Schedule, optimizer, state and step of a run; nothing is compiled or allocated yet.

    Args:
      model: what to train.
      objective: what to minimise.
      config: of the optimizer.
      steps: how many there will be, for the schedule.
      trainable: patterns of the parameters to train; see `partition`.
      seed: of LoRA's dropout.
    """
    schedule = make_schedule(config, steps)
    optimizer = make_optimizer(config, schedule, model.config.hidden_size)
    own = objective.abstract(model.sizes, model.options.sharding)
    abstract = abstract_state(model, optimizer, trainable, own)
    step = make_train_step(model, objective, optimizer, schedule, trainable, abstract, seed)
    return Program(
        abstract, step, lambda params: init_state(params, optimizer, trainable, abstract)
    )


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...],
    own: Params | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the state without any array; see `abstract_model`.

    `own` are parameters that the model does not have: the objective's.
    """
    sharding = model.options.sharding
    params = merge(abstract_model(model), own or {})
    free, _ = partition(params, trainable)
    opt_state = abstract_opt_state(optimizer, free, sharding.replicated)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated)
    return TrainState(step, params, opt_state)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...],
    abstract: TrainState,
) -> TrainState:
    """The state before the first step, placed as `abstract` says."""
    init = jax.jit(optimizer.init, out_shardings=_shardings(abstract.opt_state))
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return TrainState(step, params, init(partition(params, trainable)[0]))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    trainable: tuple[str, ...],
    abstract: TrainState,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step, compiled once: its state is donated, its batch's shape static.

    Gradients are summed over the micro-batches that hold anything; how many that is may differ
    from step to step without another compilation. LoRA's dropout goes by `seed`, the step and the
    micro-batch.
    """
    dropping = model.lora.rank > 0 and model.lora.dropout > 0

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        free, frozen = partition(state.params, trainable)
        weights = objective.weights(batch.targets)

        def loss_of(free: Params, index: Any) -> jax.Array:
            micro = jax.tree.map(lambda x: x[index], batch._replace(microbatches=None))
            key = jax.random.fold_in(jax.random.key(seed), state.step) if dropping else None
            key = None if key is None else jax.random.fold_in(key, index)
            params = merge(free, frozen)
            scores = scores_of(model, params, micro, key)
            return objective.loss(scores, micro.targets, weights, params)

        gradient = jax.value_and_grad(loss_of)
        if batch.samples.shape[0] == 1:
            loss, grads = gradient(free, 0)
        else:
            loss, grads = _summed(loss_of, free, batch.microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, free)
        metrics = Metrics(loss, optax.tree.norm(grads), jnp.asarray(schedule(state.step)))
        moved: Any = optax.apply_updates(free, updates)
        params = merge(moved, frozen)
        return TrainState(state.step + 1, params, opt_state), metrics

    replicated = model.options.sharding.replicated
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=compiler_options(replicated.mesh),
        out_shardings=(_shardings(abstract), Metrics._make([replicated] * 3)),
    )


def scores_of(
    model: Model, params: Params, batch: Batch, dropout: jax.Array | None = None
) -> Float32[Array, "... S A"]:
    """What an objective compares with the targets of one micro-batch.

    Of a reward model these are the scores of each sample, of a language model the log-probability
    of its response; of one that learns from its own samples, of the token behind each place.
    A critic's are its values at each place.
    """
    if isinstance(batch.targets, Rollouts) and isinstance(model.head, LanguageModelHead):
        places = batch.targets.predicting
        return model.log_probabilities(params, batch.rows, places, dropout).tokens[..., None]
    if not isinstance(batch.targets, PolicyTargets):
        return model(params, batch.rows, dropout)
    places = batch.targets.responses.predicting
    return response_scores(model, params, batch.rows, places, dropout)


def _summed(
    loss_of: Callable[[Params, Any], jax.Array], free: Params, count: jax.Array
) -> tuple[jax.Array, Params]:
    """`loss_of(free, i)` and its gradient, summed over i from 0 to `count`.

    The backward pass adds each layer's gradient to the sum where that lies. Adding whole gradients
    instead would need a second place for all of them.
    """
    sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), free)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        loss, backward = jax.vjp(lambda free: loss_of(free, index), free)
        backward.with_refs(sums)(jnp.ones_like(loss))
        return total + loss

    with jax.named_scope(MICROBATCH_LOOP):
        loss = jax.lax.fori_loop(0, count, add, jnp.zeros(()))
    return loss, jax.tree.map(jax.freeze, sums)
