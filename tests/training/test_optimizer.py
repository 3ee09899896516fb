import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.models import make_model, one_device, tiny_llama
from helpers.targets import regression
from rmjax.config import OptimizerConfig
from rmjax.data.batch import BATCH_AXES
from rmjax.data.batches import training_batches
from rmjax.data.planning import plan_steps
from rmjax.data.row_layout import RowShape
from rmjax.data.tokenize import load_tokenized
from rmjax.data.tokenizer import byte_tokenizer
from rmjax.errors import UserError
from rmjax.models.parameters import PARAMETERS, flatten, nest
from rmjax.runtime.sharding import put
from rmjax.training.optimizer import (
    decay_mask,
    make_optimizer,
    make_schedule,
    merge,
    partition,
    round_at_random,
)
from rmjax.training.step import abstract_state, init_state, make_train_step

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    schedule = make_schedule(config, steps)
    return np.asarray([schedule(jnp.int32(step)) for step in range(steps + 3)])


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rate_by_hand(schedule, warmup):
    peak, steps, final = 0.5, 12, 0.1
    config = OptimizerConfig(peak, schedule, warmup_steps=warmup, final_fraction=final)

    def expected(step):
        if step < warmup:
            return peak * (step + 1) / warmup
        done = min(1.0, (step - warmup) / (steps - warmup))
        fraction = {
            "constant": 1.0,
            "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done * (1 - final),
        }[schedule]
        return peak * fraction

    found = rates(config, steps)
    np.testing.assert_allclose(found, [expected(s) for s in range(steps + 3)], rtol=1e-6)
    assert found[0] > 0
    assert found[max(0, warmup - 1)] == np.float32(peak)
    assert found.max() == np.float32(peak)


def test_a_run_shorter_than_its_warm_up_only_rises():
    found = rates(OptimizerConfig(1.0, "cosine", warmup_steps=10), 4)
    np.testing.assert_allclose(found[:4], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def adamw_by_hand(params, grads, config, rate, moments, count):
    """One step in float64, as arXiv 1711.05101 has it, after clipping."""
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
    after = {}
    for path, grad in grads.items():
        grad = grad * min(1.0, config.clip_norm / norm)
        m, v = moments.get(path, (0.0, 0.0))
        m = config.b1 * m + (1 - config.b1) * grad
        v = config.b2 * v + (1 - config.b2) * grad**2
        moments[path] = m, v
        step = (m / (1 - config.b1**count)) / (np.sqrt(v / (1 - config.b2**count)) + config.eps)
        decays = "norm" not in path and "bias" not in path
        after[path] = params[path] - rate * (step + config.weight_decay * decays * params[path])
    return after


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_adamw_by_hand(clip_norm, rng):
    config = OptimizerConfig(
        0.1, "linear", warmup_steps=2, weight_decay=0.3, clip_norm=clip_norm, eps=1e-6
    )
    schedule = make_schedule(config, 5)
    optimizer = make_optimizer(config, schedule)
    leaves = flatten(
        make_model(tiny_llama(attention_bias=True, mlp_bias=True), 5, one_device()).abstract()
    )
    params = {path: rng.normal(size=leaf.shape) for path, leaf in leaves.items()}
    ours: Any = nest({path: jnp.asarray(value, jnp.float32) for path, value in params.items()})
    state, moments = optimizer.init(ours), {}
    update = jax.jit(optimizer.update)
    for step in range(5):
        grads = {
            p: rng.normal(size=v.shape) * 10.0 ** rng.integers(-3, 1) for p, v in params.items()
        }
        tree = nest({p: jnp.asarray(g, jnp.float32) for p, g in grads.items()})
        updates, state = update(tree, state, ours)
        ours = optax.apply_updates(ours, updates)
        rate = float(schedule(jnp.int32(step)))
        params = adamw_by_hand(params, grads, config, rate, moments, step + 1)
        for path, value in flatten(ours).items():
            np.testing.assert_allclose(value, params[path], rtol=2e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("b2", [0.98, 0.999])
def test_moments_in_bfloat16_give_optaxs_adamw_within_their_digits(b2, rng):
    """Gradients that shrink tenfold half way, so that second moments must fall by a hundred.

    bfloat16 has 8 bits: a moment is off by up to .4 %, the second one, whose roundings add up over
    1 / (1 - b2) steps, by some per cent at b2 = .999, and the updates by half of that. The update's
    length and the mean of second moments have no such error, because it is random; rounded to the
    nearest, they would be off by a quarter and by a factor of two.
    """
    config = OptimizerConfig(1.0, warmup_steps=0, b2=b2, weight_decay=0.1, moments="bfloat16")
    config.clip_norm = 1e9
    ours = make_optimizer(config, lambda step: jnp.float32(1.0))
    theirs = optax.adamw(1.0, b2=b2, weight_decay=0.1)
    params = {"head": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}

    def steps(optimizer):
        def step(state, number):
            scale = jnp.where(number < 400, 1e-3, 1e-4)
            grads = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (64, 64))
            updates, state = optimizer.update({"head": grads * scale}, state, params)
            return state, updates["head"]

        return jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(1000)))(
            optimizer.init(params)
        )

    (after, found), (expected_state, expected) = steps(ours), steps(theirs)
    found, expected = np.asarray(found[-100:]), np.asarray(expected[-100:])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {0.98: 0.01, 0.999: 0.04}[b2]
    assert np.linalg.norm(found) / np.linalg.norm(expected) == pytest.approx(1, abs=0.005)
    kept = optax.tree.get(after, "nu")["head"]
    assert kept.dtype == optax.tree.get(after, "mu")["head"].dtype == jnp.bfloat16
    mean = np.asarray(optax.tree.get(expected_state, "nu")["head"]).mean()
    assert np.asarray(kept, np.float64).mean() == pytest.approx(mean, rel=0.01)


def test_rounding_at_random_is_right_on_average():
    """Between two neighbours and never beyond; what bfloat16 can hold stays."""
    low, high = np.float32(1.0), np.float32(1 + 2**-7)
    x = jnp.full(100_000, low + 0.3 * (high - low), jnp.float32)
    found = np.asarray(round_at_random(x, jax.random.key(0)), np.float32)
    assert set(found) == {low, high}
    assert np.mean(found == high) == pytest.approx(0.3, abs=0.01)  # 7 standard deviations
    exact = jnp.asarray([0.0, 1.0, -2.5, 1e-38, 3e38, np.inf], jnp.bfloat16)
    for seed in range(20):
        again = round_at_random(exact.astype(jnp.float32), jax.random.key(seed))
        np.testing.assert_array_equal(again, exact)


def test_decay_covers_every_parameter_and_spares_norms_and_biases():
    mask = flatten(decay_mask(nest({row.path: 0 for row in PARAMETERS})))
    assert set(mask) == {row.path for row in PARAMETERS}
    assert {path for path, decays in mask.items() if not decays} == {
        path for path in mask if "norm" in path or path.endswith("_bias")
    }
    assert mask["embed"] and mask["head"] and mask["layers/down"]


@pytest.mark.parametrize("path", ["layers/router", "heads", "embeds", "layers/qkv"])
def test_a_parameter_no_decay_rule_covers_raises(path):
    with pytest.raises(ValueError, match=f"{path!r}"):
        decay_mask(nest({"head": 0, path: 0}))


def test_partition_and_merge_are_inverse():
    params = nest({row.path: row.path for row in PARAMETERS})
    free, frozen = partition(params, ("layers/(q|k)", "head"))
    assert set(flatten(free)) == {"layers/q", "layers/k", "head"}
    assert not set(flatten(free)) & set(flatten(frozen))
    assert merge(free, frozen) == params


@pytest.mark.parametrize("pattern", ["layers", "q", "layers/q.", "score"])
def test_a_pattern_must_match_a_whole_path(pattern):
    params = nest({row.path: row.path for row in PARAMETERS})
    with pytest.raises(UserError, match=f"pattern {pattern!r} matches no parameter; .*layers/q"):
        partition(params, (".*norm", pattern))


@pytest.fixture(scope="module")
def data():
    return load_tokenized(
        "generated:32",
        "train",
        byte_tokenizer(),
        attributes=ATTRIBUTES,
        label_range=(0, 4),
        max_length=256,
        over_long="drop",
    )


def trained(data, trainable, config, steps=3):
    """State before and after some steps of a tiny model."""
    model = make_model(tiny_llama())
    sharding = model.options.sharding
    batches = training_batches(
        data, plan_steps(data, batch_size=8, seed=0, steps=steps), RowShape(2, 256, 4)
    )
    schedule = make_schedule(config, steps)
    optimizer = make_optimizer(config, schedule)
    abstract = abstract_state(model, optimizer, trainable)
    rng = np.random.default_rng(0)
    kept = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), abstract.params)
    before = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), kept, abstract.params)
    state = init_state(before, optimizer, trainable, abstract)
    step = make_train_step(model, regression, optimizer, schedule, trainable, abstract)
    metrics = []
    for number in range(steps):
        state, found = step(state, put(batches[number], BATCH_AXES, sharding))
        metrics.append(jax.tree.map(float, found))
    return flatten(kept), state, metrics


HEAD, LAYERS = ("head",), ("layers/.*", "head")


@pytest.fixture(scope="module")
def runs(data):
    config = OptimizerConfig(0.1, warmup_steps=2, weight_decay=0.5, clip_norm=1e-3)
    return {trainable: trained(data, trainable, config) for trainable in (HEAD, LAYERS)}


@pytest.mark.parametrize("trainable", [HEAD, LAYERS])
def test_frozen_parameters_stay_to_the_bit_and_have_no_state(runs, trainable):
    before, state, _ = runs[trainable]
    free = {p for p in before if p == "head" or (trainable == LAYERS and p.startswith("layers/"))}
    after = flatten(state.params)
    assert {p for p in before if not np.array_equal(before[p], after[p])} == free
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [before[path].shape for path in free])


def test_the_reported_norm_is_the_gradients_before_clipping(runs):
    for _, _, metrics in runs.values():
        assert all(step.grad_norm > 1 for step in metrics)


def test_the_reported_rate_is_the_schedules(runs):
    for _, _, metrics in runs.values():
        assert [step.learning_rate for step in metrics] == pytest.approx([0.05, 0.1, 0.1])


def test_step_number_counts(runs):
    for _, state, _ in runs.values():
        counters = [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
        assert [int(state.step), *counters] == [3, 3, 3]
