import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import make_model, one_device, tiny_llama
from helpers.targets import regression
from helpers.tokenized import make_data
from rmjax.data.batches import iterate, make_batch, training_batches
from rmjax.data.planning import plan_steps, row_shape
from rmjax.data.row_layout import RowShape
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score
from rmjax.models.init import random_params
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.step import abstract_state, init_state, make_train_step


def grouped(sizes):
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return make_data([3] * len(groups), groups)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 8), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_an_epoch_sees_every_sample_once_and_prompts_stay_whole(sizes, batch_size, seed, epochs):
    data = grouped(sizes)
    plan = plan_steps(data, batch_size=batch_size, seed=seed, epochs=epochs)
    assert all(0 < len(step) <= batch_size for step in plan)
    order = np.concatenate(plan)
    step_of = np.repeat(np.arange(len(plan)), [len(step) for step in plan])
    for epoch in range(epochs):
        part = slice(epoch * len(data), (epoch + 1) * len(data))
        assert sorted(order[part]) == list(range(len(data)))
        for group, size in enumerate(sizes):
            steps = step_of[part][data.prompt_ids[order[part]] == group]
            assert len(set(steps)) == -(-size // batch_size)
    assert len(order) == epochs * len(data)


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 8), seed=st.integers(0, 9))
def test_a_step_ends_only_where_the_next_prompt_does_not_fit(sizes, batch_size, seed):
    data = grouped(sizes)
    plan = plan_steps(data, batch_size=batch_size, seed=seed, epochs=2)
    for step, following in itertools.pairwise(plan):
        same = data.prompt_ids[following] == data.prompt_ids[following[0]]
        assert len(step) + np.argmin([*same, False]) > batch_size


@pytest.mark.parametrize(("epochs", "samples"), [(0.5, 10), (1.0, 20), (1.25, 26), (0.01, 2)])
def test_epochs_may_be_a_fraction(epochs, samples):
    """As many prompts, here of two responses, as reach that share."""
    plan = plan_steps(grouped([2] * 10), batch_size=4, seed=0, epochs=epochs)
    assert sum(map(len, plan)) == samples
    assert all(len(step) == 4 for step in plan[:-1])


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 8), steps=st.integers(1, 20))
def test_steps_are_counted_and_begin_like_epochs(sizes, batch_size, steps):
    data = grouped(sizes)
    plan = plan_steps(data, batch_size=batch_size, seed=1, steps=steps)
    assert len(plan) == steps
    longer = plan_steps(data, batch_size=batch_size, seed=1, epochs=1 + steps * batch_size)
    for ours, theirs in zip(plan, longer[:-1]):
        np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides_the_order_and_epochs_differ():
    data = grouped([2] * 50)
    plan = functools.partial(plan_steps, data, batch_size=10, epochs=2)
    np.testing.assert_array_equal(plan(seed=3), plan(seed=3))
    assert not np.array_equal(plan(seed=3), plan(seed=4))
    first, second = np.split(np.concatenate(plan(seed=3)), 2)
    assert not np.array_equal(first, second)


def test_helpsteer2s_two_epochs_are_318_steps_of_128():
    """20,324 responses by pairs: 317.6 steps, of which the recipe counts the full ones."""
    plan = plan_steps(grouped([2] * 10162), batch_size=128, seed=0, epochs=2)
    assert [len(step) for step in plan] == [128] * 317 + [72]


def test_a_row_has_slots_for_short_samples_but_not_more_than_can_fit():
    assert row_shape(make_data([100] * 9), rows=8, length=400, packing=True) == RowShape(8, 400, 4)
    assert row_shape(make_data([50, 150]), rows=1, length=400, packing=True) == RowShape(1, 400, 8)
    assert row_shape(make_data([50, 150]), rows=1, length=400, packing=False).slots == 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=20),
    rows=st.integers(1, 4),
    slots=st.integers(1, 5),
)
def test_a_batch_holds_every_sample_where_it_says(lengths, rows, slots):
    """Each array rebuilt here from where the batch says each sample is."""
    data = make_data(lengths)
    shape = RowShape(rows, 24, slots)
    batches = training_batches(data, [np.arange(len(lengths))], shape)
    batch = batches[0]
    assert batch.samples.shape == (batches.microbatches, rows, slots)
    assert sorted(batch.samples[batch.samples >= 0]) == list(range(len(lengths)))

    expected = jax.tree.map(np.zeros_like, batch)
    starts = np.zeros(batch.samples.shape[:2], int)
    for (m, row, slot), sample in np.ndenumerate(batch.samples):
        if sample < 0:
            continue
        start = starts[m, row]
        end = starts[m, row] = start + lengths[sample]
        expected.rows.tokens[m, row, start:end] = data.sequence(sample)
        expected.rows.segment_ids[m, row, start:end] = slot + 1
        expected.rows.positions[m, row, start:end] = range(lengths[sample])
        expected.rows.last_token_index[m, row, slot] = end - 1
        for column, label in enumerate(data.labels[sample]):
            if not np.isnan(label):
                expected.targets.ratings.labels[m, row, slot, column] = label
                expected.targets.ratings.weights[m, row, slot, column] = 1
        expected.rows.masked_start[m, row, start:end] = start
        expected.rows.masked_end[m, row, start:end] = start
    rebuilt = batch._replace(rows=expected.rows, targets=expected.targets)
    jax.tree.map(np.testing.assert_array_equal, batch, rebuilt)
    assert {leaf.dtype for leaf in batch.rows} == {np.dtype(np.int32)}
    used = (batch.samples >= 0).any(axis=(1, 2))
    assert batch.microbatches == used.sum() and used[: batch.microbatches].all()


def test_every_step_of_a_run_has_the_same_shapes(rng):
    data = make_data(rng.integers(1, 60, 50).tolist())
    plan = plan_steps(data, batch_size=7, seed=0, epochs=2)
    batches = training_batches(data, plan, row_shape(data, rows=2, length=64, packing=True))
    shapes = {tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len(shapes) == 1
    assert max(batch.microbatches for batch in batches) == batches.microbatches


def test_tokens_places_and_rows_are_told(rng):
    data = make_data(rng.integers(1, 60, 50).tolist())
    plan = plan_steps(data, batch_size=7, seed=0, epochs=1)
    batches = training_batches(data, plan, RowShape(2, 64, 4))
    for step in range(len(batches)):
        batch = batches[step]
        assert batches.tokens(step) == (batch.rows.segment_ids > 0).sum()
        assert batches.padded_tokens(step) == batch.microbatches * 2 * 64
        named = sorted(int(data.rows[i]) for i in batch.samples[batch.samples >= 0])
        assert batches.describe(step) == f"memory rows {', '.join(map(str, named))}"
    assert batches.position(3) == {"next_step": 3, "samples": 21, "data": "key"}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=40),
    rows=st.integers(1, 4),
    slots=st.integers(1, 5),
)
def test_evaluation_holds_every_sample_once(lengths, rows, slots):
    batches = evaluation_batches(make_data(lengths), RowShape(rows, 24, slots))
    samples = np.concatenate([batch.samples for batch in batches])
    assert sorted(samples[samples >= 0]) == list(range(len(lengths)))
    assert all(batch.samples.shape == (1, rows, slots) for batch in batches)


def test_a_run_continued_anywhere_sees_what_an_unbroken_one_sees(rng):
    data = make_data(rng.integers(1, 60, 40).tolist())
    plan = plan_steps(data, batch_size=6, seed=0, epochs=2)
    batches = training_batches(data, plan, RowShape(8, 64, 4))
    sharding = Sharding(make_mesh(MeshConfig()))
    full = list(iterate(batches, 0, sharding))
    assert len(full) == len(plan) > 8
    for step, batch in enumerate(full):
        jax.tree.map(np.testing.assert_array_equal, batch, batches[step])
    for start in (1, 7, len(plan) - 1, len(plan)):
        tail = list(iterate(batches, start, sharding))
        assert len(tail) == len(plan) - start
        for ours, theirs in zip(tail, full[start:]):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- the loss and its gradient do not depend on how a step is computed -------------------------

LLAMA = tiny_llama()
LENGTHS = [5, 30, 12, 9, 23, 17, 31, 6, 3, 14, 28, 11]
DATA = make_data(LENGTHS, attributes=5)


@functools.cache
def params():
    return jax.device_get(random_params(make_model(LLAMA), seed=2))


def loss_and_gradient(shape, mesh=None, spare=False):
    """Of one step over all of DATA; `spare`: with room for as many micro-batches again."""
    sharding = Sharding(make_mesh(mesh)) if mesh else one_device()
    model = make_model(LLAMA, sharding=sharding)
    optimizer = optax.trace(decay=0.0)  # its state is the gradient
    abstract = abstract_state(model, optimizer, (".*",))
    placed = jax.tree.map(
        lambda x, leaf: jax.device_put(x, leaf.sharding), params(), abstract.params
    )
    state = init_state(placed, optimizer, (".*",), abstract)
    step = make_train_step(
        model, regression, optimizer, lambda step: jnp.float32(1.0), (".*",), abstract
    )
    samples = np.arange(len(LENGTHS))
    batches = training_batches(DATA, [samples, np.tile(samples, 2)] if spare else [samples], shape)
    batch = next(iterate(batches, 0, sharding))
    assert (int(batch.microbatches) < batches.microbatches) == spare
    state, metrics = step(state, batch)
    return (
        float(metrics.loss),
        jax.device_get(optax.tree.get(state.opt_state, "trace")),
        float(metrics.grad_norm),
    )


@functools.cache
def unpacked():
    return loss_and_gradient(RowShape(len(LENGTHS), 32, 1))


def test_masked_labels_are_present_in_what_follows():
    missing = np.isnan(DATA.labels)
    assert 0.1 < missing.mean() < 0.6
    assert len(set(missing.sum(axis=1))) > 2  # so that a mean of means would differ


def test_the_loss_is_the_mean_over_present_labels():
    model = make_model(LLAMA)
    rows = make_batch(DATA, [[np.asarray([i])] for i in range(12)], RowShape(12, 32, 1), 1).rows
    scores = np.asarray(make_score(model)(params(), jax.tree.map(lambda x: x[0], rows)))[:, 0]
    expected = np.nanmean((scores.astype(np.float64) - DATA.labels) ** 2)
    np.testing.assert_allclose(unpacked()[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mesh", "spare"),
    [
        (RowShape(4, 64, 8), None, False),
        (RowShape(1, 64, 8), None, True),
        (RowShape(8, 64, 8), MeshConfig(fsdp=8), False),
        (RowShape(4, 32, 4), MeshConfig(data=2, fsdp=2, tensor=2), False),
    ],
    ids=["packed", "row by row", "packed on fsdp 8", "accumulated on data, fsdp and tensor"],
)
def test_loss_and_gradient_do_not_depend_on_rows_accumulation_or_mesh(shape, mesh, spare):
    loss, gradient, norm = loss_and_gradient(shape, mesh, spare)
    expected_loss, expected, expected_norm = unpacked()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-5)
    ours, theirs = flatten(gradient), flatten(expected)
    assert ours.keys() == theirs.keys() == flatten(params()).keys()
    for path in theirs:
        error = np.linalg.norm(ours[path] - theirs[path]) / np.linalg.norm(theirs[path])
        assert error < 1e-5, (path, error)
