"""Parameters before training: their shapes, and random values."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rmjax.models.decoder import Decoder
from rmjax.models.inputs import Rows
from rmjax.models.model import Model
from rmjax.models.parameters import Params, flatten, initializer, nest


def abstract_model(model: Model) -> Params:
    """Shapes, dtypes and shardings of the parameters in training, without any array.

    They are float32, save that LoRA keeps the weights it freezes in the dtype of the computation,
    to which every product rounds them anyway: no score changes by that.
    """
    return model.abstract(model.options.dtype if model.lora.rank else jnp.float32)


def random_params(model: Model, seed: int) -> Params:
    """All weights from their initial distributions; the same numbers on every mesh."""
    return nest(random_leaves(model, seed, list(flatten(abstract_model(model)))))


def random_head(model: Model, seed: int) -> Float32[Array, "D A"]:
    """The reward head that `random_params` would give; the other weights are never made."""
    return random_leaves(model, seed, ["head"])["head"]


def random_leaves(model: Model, seed: int, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Those of the parameters that `random_params` would give; the others are never made."""
    abstract = flatten(abstract_model(model))
    sharding = model.options.sharding
    length = sharding.mesh.shape["context"]
    tokens = jnp.zeros((sharding.row_shards, length), jnp.int32)
    rows = Rows._make([tokens] * 5 + [tokens[:, :1]])

    def init(key: jax.Array) -> dict[str, jax.Array]:
        variables: Any = _Everything(model.decoder, model).init(key, rows)
        leaves = flatten(variables["params"])
        return {path: leaves[path].astype(abstract[path].dtype) for path in paths}

    placed = {path: abstract[path].sharding for path in paths}
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))


class _Everything(nn.Module):
    """The decoder's parameters and the head's in one scope, for Flax to initialise."""

    decoder: Decoder
    model: Model

    def setup(self) -> None:
        nn.share_scope(self, self.decoder)

    @nn.compact
    def __call__(self, rows: Rows) -> Any:
        self.decoder(rows)
        for row in self.model.head.parameters:
            shape = tuple(self.model.sizes[axis] for axis in row.axes.split())
            self.param(row.path, initializer(row, self.model.config), shape, jnp.float32)
