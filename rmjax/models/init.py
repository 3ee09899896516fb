"""Parameters before training: their shapes, and random values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rmjax.models.inputs import Rows
from rmjax.models.parameters import Params, abstract_params, flatten, in_float32, nest
from rmjax.models.reward_model import RewardModel


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


def _initializer(model: RewardModel) -> Callable[[jax.Array], Any]:
    sharding = model.options.sharding
    length = sharding.mesh.shape["context"]
    tokens = jnp.zeros((sharding.row_shards, length), jnp.int32)
    rows = Rows._make([tokens] * 5 + [tokens[:, :1]])
    return lambda key: model.init(key, rows)["params"]
