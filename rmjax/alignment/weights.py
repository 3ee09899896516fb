"""A policy's parameters as another of its models takes them: fewer, in another dtype, elsewhere."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rmjax.models.parameters import TABLE, Params, flatten, nest
from rmjax.runtime.compilation import compiler_options

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # with shardings, by path


def picked(params: Params, wanted: Params) -> Params:
    """Those of the parameters that `wanted` has."""
    leaves = flatten(params)
    return nest({path: leaves[path] for path in flatten(wanted)})


def copied(params: Params, wanted: Params) -> Params:
    """Those of the parameters that `wanted` has, in its dtypes, as arrays of their own."""
    return jax.tree.map(lambda leaf, to: _copy(leaf, to.dtype), picked(params, wanted), wanted)


def moved(params: Params, wanted: Params) -> Params:
    """Parameters as `wanted` has them: which, in what dtypes, and where on the same devices.

    Args:
      params: at least those of `wanted`. What is there already in its dtype is not copied.
      wanted: shapes, dtypes and shardings, on a mesh of the same devices in the same order.
    """
    leaves, changed = flatten(params), changes(params, wanted)
    new = move_program(changed)({path: leaves[path] for path in changed}) if changed else {}
    return nest({path: new.get(path, leaves[path]) for path in flatten(wanted)})


def changes(params: Params, wanted: Params) -> Shapes:
    """Those of `wanted` that `params`, arrays or shapes, have in another dtype or elsewhere."""
    leaves = flatten(params)

    def is_there(path: str, to: Any) -> bool:
        same = leaves[path].sharding.is_equivalent_to(to.sharding, len(to.shape))
        return same and leaves[path].dtype == to.dtype

    return {path: to for path, to in flatten(wanted).items() if not is_there(path, to)}


def move_program(wanted: Shapes) -> Any:
    """The compiled function from parameters by path to what is wanted of them."""
    return _move_program(tuple(wanted.items()))


@functools.cache
def _move_program(wanted: tuple[tuple[str, Any], ...]) -> Any:
    placed = {path: to.sharding for path, to in wanted}

    def move(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stacked = {path: to for path, to in wanted if TABLE[path].stacked}
        whole = {path: leaves[path].astype(to.dtype) for path, to in wanted if path not in stacked}
        return whole | _layer_by_layer({path: leaves[path] for path in stacked}, stacked)

    options = compiler_options(wanted[0][1].sharding.mesh)
    return jax.jit(move, out_shardings=placed, compiler_options=options)


def _layer_by_layer(leaves: dict[str, jax.Array], wanted: Shapes) -> dict[str, jax.Array]:
    """Between meshes with little in common, each device may hold all that moves for a while.

    One loop for all of them. XLA's CPU runs loops that need nothing of each other at once, each
    holds a thread while it waits for other devices, and eight of them on eight devices waited for
    ever.
    """
    if not wanted:
        return {}

    def one(leaf: jax.Array, to: Any) -> jax.Array:
        place = NamedSharding(to.sharding.mesh, PartitionSpec(*to.sharding.spec[1:]))
        return jax.lax.with_sharding_constraint(leaf.astype(to.dtype), place)

    return jax.lax.map(
        lambda layer: {path: one(layer[path], to) for path, to in wanted.items()}, leaves
    )


@functools.partial(jax.jit, static_argnums=1)
def _copy(leaf: jax.Array, dtype: Any) -> jax.Array:
    return jnp.copy(leaf).astype(dtype)
