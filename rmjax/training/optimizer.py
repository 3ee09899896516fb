"""AdamW, its schedule, what decays and what is trained at all."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32

from rmjax.config import OptimizerConfig
from rmjax.errors import UserError
from rmjax.models.parameters import TABLE, Parameter, Params, flatten, nest


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of each step, from step 0; the first step already moves the weights."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_fraction)
    else:
        final = peak * config.final_fraction
        after = optax.linear_schedule(peak, final, max(1, steps - warmup))

    def schedule(step: jax.Array) -> jax.Array:
        count = jnp.asarray(step, jnp.float32)
        rising = peak * (count + 1) / max(1, warmup)
        return jnp.where(count < warmup, rising, after(count - warmup))

    return schedule


def decay_mask(params: Params) -> Params:
    """True where weight decay applies; raises `ValueError` for a parameter of no table."""
    return nest({path: _row(path).decays for path in flatten(params)})


def _row(path: str) -> Parameter:
    if path not in TABLE:
        raise ValueError(f"parameter {path!r} has no row in models/parameters.py: add one")
    return TABLE[path]


def make_optimizer(
    config: OptimizerConfig, schedule: Callable[[jax.Array], jax.Array], width: int = 1
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decay where the table says so.

    Args:
      config: of AdamW.
      schedule: the learning rate by step.
      width: how many numbers a score sums over. Parameters that move as a score does, such as the
        thresholds that scores are compared with, move so many times as fast as the others.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    adamw = optax.chain(
        adam if config.moments == "float32" else keep_in_bfloat16(adam),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        _scores_faster(optax.scale_by_learning_rate(schedule), width),  # pyright: ignore[reportArgumentType]
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _scores_faster(rate: Any, factor: int) -> optax.GradientTransformation:
    """`rate`, its updates times `factor` where a parameter moves as a score does.

    AdamW moves every number by up to the learning rate. A score is a sum of `width` products and
    moves by as many times that. Thresholds would lag behind it, and at the learning rates of large
    models never leave where they began. (`optax.masked` would do the same with a state of its own,
    and so with another format of checkpoints.)
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rate.update(updates, state, params)
        factors = {path: factor if _row(path).moves_as_score else 1 for path in flatten(updates)}
        return jax.tree.map(lambda x, by: x if by == 1 else by * x, updates, nest(factors)), state

    return optax.GradientTransformation(rate.init, update)


def keep_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, computed in float32, with its moments kept in bfloat16.

    The first moment is rounded to the nearest. The second changes by less than half of bfloat16's
    last place a step where b2 is near 1, and would never change: it is rounded up or down at
    random, so that it is right on average. The randomness is a function of the step's number.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        state: Any = adam.init(params)
        return _cast(state, jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        updates, after = adam.update(updates, _cast(state, jnp.float32), params)
        leaves, tree = jax.tree.flatten(after.nu)  # pyright: ignore[reportAttributeAccessIssue]
        keys = jax.random.split(jax.random.key(state.count), len(leaves))
        nu = tree.unflatten(map(round_at_random, leaves, keys))
        return updates, _cast(after, jnp.bfloat16)._replace(nu=nu)

    return optax.GradientTransformation(init, update)


def _cast(state: Any, dtype: Any) -> Any:
    mu, nu = jax.tree.map(lambda leaf: leaf.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)


def round_at_random(x: Float32[Array, "..."], key: jax.Array) -> BFloat16[Array, "..."]:
    """One of the two bfloat16 numbers around each `x`, the nearer the likelier: `x` on average."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # What is left of it after this is a bfloat16, so that the conversion rounds nothing.
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(jnp.bfloat16)


def partition(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits parameters into those whose path fully matches one of the patterns, and the rest.

    Raises:
      UserError: a pattern matches nothing.
    """
    leaves = flatten(params)
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in leaves):
            raise UserError(
                f"trainable: pattern {pattern!r} matches no parameter; there are "
                + ", ".join(sorted(leaves))
            )
    chosen = {p for p in leaves if any(re.fullmatch(pattern, p) for pattern in trainable)}
    return (
        nest({p: leaf for p, leaf in leaves.items() if p in chosen}),
        nest({p: leaf for p, leaf in leaves.items() if p not in chosen}),
    )


def merge(first: Params, second: Params) -> Params:
    """The inverse of `partition`."""
    return nest(flatten(first) | flatten(second))


def abstract_opt_state(
    optimizer: optax.GradientTransformation, trainable: Params, replicated: Any
) -> Any:
    """Shapes and shardings of the optimizer's state: moments lie where their parameters do."""
    state = jax.eval_shape(optimizer.init, trainable)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        state,
        trainable,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=replicated
        ),
    )
