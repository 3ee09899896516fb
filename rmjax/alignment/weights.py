"""A policy's parameters as another of its models takes them: fewer, in another dtype, elsewhere."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.models.parameters import Params, flatten, nest


def picked(params: Params, wanted: Params) -> Params:
    """Those of the parameters that `wanted` has."""
    leaves = flatten(params)
    return nest({path: leaves[path] for path in flatten(wanted)})


def moved(params: Params, wanted: Params) -> Params:
    """Parameters as `wanted` has them: which, in what dtypes, and where on the same devices.

    What is so already is not copied.

    Args:
      params: at least those of `wanted`.
      wanted: shapes, dtypes and shardings.
    """
    cast = _cast(picked(params, wanted), _dtypes(wanted), False)
    return jax.tree.map(_placed, cast, wanted)


def copied(params: Params, wanted: Params) -> Params:
    """The same as arrays of their own, where the parameters are."""
    return _cast(picked(params, wanted), _dtypes(wanted), True)


def _dtypes(wanted: Params) -> tuple[Any, ...]:
    return tuple(leaf.dtype for leaf in jax.tree.leaves(wanted))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(params: Params, dtypes: tuple[Any, ...], copy: bool) -> Params:
    leaves, tree = jax.tree.flatten(params)
    cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    # What a jitted function returns as it was given is not copied, unless it says so.
    return tree.unflatten([jnp.copy(leaf) for leaf in cast] if copy else cast)


def _placed(array: jax.Array, wanted: Any) -> jax.Array:
    if array.sharding.is_equivalent_to(wanted.sharding, array.ndim):
        return array
    return jax.device_put(array, wanted.sharding)
