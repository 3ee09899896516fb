"""The state of a run and the two compiled functions: one step of training, and scoring."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from rmjax.compilation import compiler_options
from rmjax.model import RewardModel
from rmjax.objectives import Objective
from rmjax.optimizer import abstract_opt_state, merge, partition
from rmjax.parameters import Params, abstract_params, flatten, in_float32, nest
from rmjax.rows import Batch, Rows


class TrainState(NamedTuple):
    """Everything a step changes. Randomness, where needed, is `fold_in(seed, step)`."""

    step: Int32[Array, ""]
    params: Params
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """What a step reports; the gradient's norm is taken before clipping."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]


def abstract_model(model: RewardModel) -> Params:
    """Shapes, dtypes and shardings of the parameters in training, without any array.

    They are float32, save that LoRA keeps the weights it freezes in the dtype of the computation,
    to which every product rounds them anyway: no score changes by that.
    """
    options = model.options
    params = abstract_params(
        model.config,
        model.attributes,
        options.sharding,
        lora=model.lora,
        thresholds=model.thresholds,
    )
    if not model.lora.rank:
        return params
    return nest(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if in_float32(path) else options.dtype,
                sharding=leaf.sharding,
            )
            for path, leaf in flatten(params).items()
        }
    )


def abstract_state(
    model: RewardModel, optimizer: optax.GradientTransformation, trainable: tuple[str, ...]
) -> TrainState:
    """Shapes, dtypes and shardings of the state without any array; see `abstract_model`."""
    sharding = model.options.sharding
    params = abstract_model(model)
    free, _ = partition(params, trainable)
    return TrainState._make(
        [
            jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated),
            params,
            abstract_opt_state(optimizer, free, sharding.replicated),
        ]
    )


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


def random_params(model: RewardModel, seed: int) -> Params:
    """All weights from their initial distributions; the same numbers on every mesh."""
    return nest(random_leaves(model, seed, list(flatten(abstract_model(model)))))


def random_head(model: RewardModel, seed: int) -> Float32[Array, "D A"]:
    """The head that `random_params` would give; the other weights are never made."""
    return random_leaves(model, seed, ["head"])["head"]


def random_leaves(model: RewardModel, seed: int, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Those of the parameters that `random_params` would give; the others are never made."""
    abstract = flatten(abstract_model(model))

    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten(_initializer(model)(key))
        return {path: leaves[path].astype(abstract[path].dtype) for path in paths}

    placed = {path: abstract[path].sharding for path in paths}
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))


def apply(
    model: RewardModel, params: Params, rows: Rows, dropout: jax.Array | None = None
) -> Float32[Array, "B S A"]:
    """Scores of every slot of every row, traced into whatever is being compiled.

    Args:
      model: what to compute.
      params: its parameters.
      rows: the samples.
      dropout: the key of LoRA's dropout; None for none, as in scoring.
    """
    rngs = {} if dropout is None else {"dropout": dropout}
    scores: Any = model.apply({"params": params}, rows, rngs=rngs)
    return scores


def _initializer(model: RewardModel) -> Callable[[jax.Array], Any]:
    sharding = model.options.sharding
    length = sharding.mesh.shape["context"]
    tokens = jnp.zeros((sharding.row_shards, length), jnp.int32)
    rows = Rows._make([tokens] * 5 + [tokens[:, :1]])
    return lambda key: model.init(key, rows)["params"]


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_train_step(
    model: RewardModel,
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
            scores = apply(model, params, micro.rows, key)
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

    loss = jax.lax.fori_loop(0, count, add, jnp.zeros(()))
    return loss, jax.tree.map(jax.freeze, sums)


def make_score(model: RewardModel) -> Callable[[Params, Rows], Float32[Array, "B S A"]]:
    """Scores of rows, whole on every process: the one scoring function of REPL and trainer."""

    def score(params: Params, rows: Rows) -> jax.Array:
        return apply(model, params, rows)

    return _whole_everywhere(model, score)


def make_features(model: RewardModel) -> Callable[[Params, Rows], Float32[Array, "B S D"]]:
    """What the head reads of every slot, the last layer's normed states, whole on every process."""

    def features(params: Params, rows: Rows) -> jax.Array:
        found: Any = model.apply({"params": params}, rows, features=True)
        return found

    return _whole_everywhere(model, features)


def _whole_everywhere(
    model: RewardModel, function: Callable[[Params, Rows], jax.Array]
) -> Callable[[Params, Rows], jax.Array]:
    replicated = model.options.sharding.replicated
    return jax.jit(
        function, out_shardings=replicated, compiler_options=compiler_options(replicated.mesh)
    )
