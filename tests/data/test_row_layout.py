"""What a prompt's responses begin with stands in a row once, and no number changes."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import make_model, one_device, tiny_llama
from helpers.targets import bradley_terry, regression
from helpers.tokenized import make_data
from rmjax.config import PreferenceConfig
from rmjax.data.batch import Targets
from rmjax.data.batches import iterate, training_batches
from rmjax.data.planning import group_length, plan_steps, prompt_groups, row_shape
from rmjax.data.row_layout import RowShape, Segment, common_prefix, make_rows, segment_length
from rmjax.data.tokenized import in_memory
from rmjax.inference.batching import evaluation_batches
from rmjax.inference.score_step import make_score, score_data
from rmjax.models.attention.mask import Layout, allowed
from rmjax.models.init import random_params
from rmjax.models.parameters import flatten
from rmjax.runtime.sharding import MeshConfig, Sharding, make_mesh
from rmjax.training.objectives.objective import make_objective
from rmjax.training.step import abstract_state, init_state, make_train_step

LLAMA = tiny_llama()


def siblings(rng, sizes, prompt=(1, 20), response=(1, 12)):
    """Tokens of several groups, each its prompt and so many responses, and who belongs together."""
    tokens, prompts = [], []
    for group, size in enumerate(sizes):
        beginning = rng.integers(1, 262, rng.integers(*prompt))
        for _ in range(size):
            own = rng.integers(1, 262, rng.integers(*response))
            tokens.append(np.concatenate([beginning, own]).astype(np.int32))
            prompts.append(str(group))
    return tokens, prompts


GROUPS = st.lists(st.integers(1, 5), min_size=1, max_size=8)


# ---- the layout ---------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_common_beginning_is_the_longest_that_leaves_each_a_token(lists):
    samples = [np.asarray(tokens) for tokens in lists]
    found = common_prefix(samples)
    fits = [
        n
        for n in range(min(map(len, lists)))
        if all(tokens[:n] == lists[0][:n] for tokens in lists)
    ]
    assert found == (max(fits) if len(lists) > 1 else 0)


def test_tokens_decide_what_is_shared_not_text():
    """A tokenizer that merges across the prompt's end gives the two a different token there."""
    merged, plain = np.asarray([7, 8, 55, 3]), np.asarray([7, 8, 9, 10, 3])
    assert common_prefix([merged, plain]) == 2


def test_a_row_by_hand():
    a, b, c = np.asarray([5, 6, 7, 1]), np.asarray([5, 6, 7, 2, 3]), np.asarray([9, 9])
    row = make_rows([[Segment([a, b], 3), Segment([c])]], 1, RowShape(1, 12, 4))
    expected = {
        "tokens": [5, 6, 7, 1, 2, 3, 9, 9, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0],
        "positions": [0, 1, 2, 3, 3, 4, 0, 1, 0, 0, 0, 0],
        "masked_start": [0, 0, 0, 3, 3, 3, 6, 6, 0, 0, 0, 0],
        "masked_end": [0, 0, 0, 3, 4, 4, 6, 6, 0, 0, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(row, name)[0], values, err_msg=name)
    np.testing.assert_array_equal(row.last_token_index[0], [3, 5, 7, 0])


@settings(max_examples=60, deadline=None)
@given(sizes=GROUPS, align=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_each_sample_sees_itself_and_nothing_else(sizes, align, seed):
    """From the mask alone: what a sample's last token may see is that sample, token by token."""
    tokens, prompts = siblings(np.random.default_rng(seed), sizes)
    data, order = in_memory(tokens, prompts)
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(data.prompt_ids)) + 1)
    groups = [Segment([data.sequence(i) for i in run], int(data.shared[run[0]])) for run in runs]
    taken = [segment_length([len(t) for t in g.samples], g.shared, align) for g in groups]
    length = -(-(sum(taken) + 8) // 64) * 64  # few lengths, for each is compiled
    rows = make_rows([groups], 1, RowShape(1, length, len(tokens), align))
    mask = np.asarray(
        allowed(Layout(rows.segment_ids, rows.masked_start, rows.masked_end), 0, length)[0]
    )
    for slot, i in enumerate(order):
        end = rows.last_token_index[0, slot]
        seen = np.flatnonzero(mask[end])
        np.testing.assert_array_equal(rows.tokens[0, seen], tokens[i])
        np.testing.assert_array_equal(rows.positions[0, seen], np.arange(len(tokens[i])))
        for place, position in zip(seen, rows.positions[0, seen]):  # and so does each before it
            np.testing.assert_array_equal(np.flatnonzero(mask[place]), seen[: position + 1])
    starts = np.flatnonzero(np.diff(rows.segment_ids[0], prepend=0) > 0)
    assert not (starts % align).any()
    hidden = rows.masked_start[0] < rows.masked_end[0]
    assert not (rows.masked_start[0][hidden] % align).any()
    assert not (rows.masked_end[0][hidden] % align).any()
    assert (rows.segment_ids[0, sum(taken) :] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    share=st.booleans(),
    slots=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_units_hold_every_sample_once_and_fit(sizes, share, slots, seed):
    tokens, prompts = siblings(np.random.default_rng(seed), sizes)
    data, _ = in_memory(tokens, prompts)
    found, taken = prompt_groups(data, np.arange(len(tokens)), RowShape(1, 40, slots), share)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(len(tokens)))
    for unit, size in zip(found, taken):
        assert len(unit) <= slots and size <= 40
        assert len(set(data.prompt_ids[unit])) == 1
        assert size == group_length(data, unit, 1, share)
        if not share:
            assert len(unit) == 1
    if share:  # nothing is split that would fit
        for one, other in itertools.pairwise(found):
            if data.prompt_ids[one[0]] == data.prompt_ids[other[0]]:
                joined = np.concatenate([one, other[:1]])
                assert len(joined) > slots or group_length(data, joined, 1, share) > 40


# ---- numbers ------------------------------------------------------------------------------------


@functools.cache
def weights():
    return jax.device_get(random_params(make_model(LLAMA), seed=2))


@functools.cache
def program(objective, mesh, remat, dtype):
    """The compiled step and score, and the state to start from."""
    sharding = Sharding(make_mesh(MeshConfig(*mesh))) if mesh else one_device()
    model = make_model(LLAMA, sharding=sharding, remat=remat, dtype=jnp.dtype(dtype))
    optimizer = optax.trace(decay=0.0)  # its state is the gradient
    abstract = abstract_state(model, optimizer, (".*",))
    step = make_train_step(
        model, objective, optimizer, lambda step: jnp.float32(1.0), (".*",), abstract
    )

    def start():
        params = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding), weights(), abstract.params
        )
        return init_state(params, optimizer, (".*",), abstract)

    return sharding, start, step, make_score(model)


def computed(
    data, shape, objective, *, share, packing=True, mesh=None, remat="none", dtype="float32"
):
    """Loss and gradient of one step over all of `data`, and each sample's score."""
    sharding, start, step, score = program(objective, mesh, remat, dtype)
    plan = [np.arange(len(data))]
    batches = training_batches(data, plan, shape, packing=packing, share=share)
    batch, state = next(iterate(batches, 0, sharding)), start()
    scores = np.full((len(data), 5), np.nan, np.float32)
    for m in range(batches.microbatches):
        micro = jax.tree.map(lambda x, m=m: x[m], batch._replace(microbatches=None))
        found, samples = np.asarray(score(state.params, micro.rows)), np.asarray(micro.samples)
        scores[samples[samples >= 0]] = found[samples >= 0]
    state, metrics = step(state, batch)
    return (
        float(metrics.loss),
        flatten(jax.device_get(optax.tree.get(state.opt_state, "trace"))),
        scores,
    )


def assert_same(found, expected, *, scores=1e-5, gradients=1e-4):
    np.testing.assert_allclose(found[2], expected[2], atol=scores, rtol=scores)
    np.testing.assert_allclose(found[0], expected[0], rtol=gradients)
    for path, theirs in expected[1].items():
        error = np.linalg.norm(found[1][path] - theirs) / np.linalg.norm(theirs)
        assert error < gradients, (path, error)


def with_labels(tokens, prompts, seed=0):
    data, _ = in_memory(tokens, prompts)
    labels = make_data([1] * len(tokens), attributes=5, seed=seed).labels
    return dataclasses.replace(data, labels=labels, attributes=tuple("abcde"))


def as_pairs(data):
    return dataclasses.replace(data, chosen=np.arange(len(data)) % 2 == 0)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    seed=st.integers(0, 10**6),
    align=st.sampled_from([1, 8]),
)
def test_shared_rows_give_the_unshared_unpacked_numbers(sizes, seed, align):
    """Scores within 1e-5, loss and gradients within 1e-4: random groups, ratings missing."""
    data = with_labels(*siblings(np.random.default_rng(seed), sizes), seed=seed)
    alone = computed(data, RowShape(32, 32, 1), regression, share=False, packing=False)
    shared = computed(data, RowShape(12, 64, 8, align), regression, share=True)
    assert_same(shared, alone)


FIXED = siblings(np.random.default_rng(5), [2, 4, 2, 6, 2, 2, 4, 2], (8, 20), (3, 12))


@functools.cache
def unshared(kind):
    data = with_labels(*FIXED)
    if kind == "pairs":
        return computed(as_pairs(data), RowShape(24, 64, 2), bradley_terry, share=False)
    return computed(data, RowShape(24, 32, 1), regression, share=False, packing=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ratings", "pairs"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (RowShape(8, 64, 8), {"mesh": (1, 8, 1, 1)}),
        (RowShape(4, 96, 8), {"mesh": (1, 2, 2, 2), "remat": "full"}),
        (RowShape(1, 64, 4), {"mesh": (1, 1, 8, 1)}),
        (RowShape(2, 128, 16), {"remat": "dots"}),
        (RowShape(6, 96, 8), {"packing": False}),
    ],
    ids=["fsdp 8", "context and tensor, full remat", "context 8", "dots", "a group a row"],
)
def test_sharing_changes_nothing_on_any_mesh(kind, shape, options):
    data = with_labels(*FIXED)
    data, objective = (as_pairs(data), bradley_terry) if kind == "pairs" else (data, regression)
    assert_same(computed(data, shape, objective, share=True, **options), unshared(kind))


@pytest.mark.slow
def test_in_bfloat16_sharing_costs_nothing_beyond_bfloat16():
    """Scores of size 1 in 8 bits: 0.02 from the unshared ones, both 0.03 from float32's (rms)."""
    data, half = with_labels(*FIXED), "bfloat16"
    found = computed(data, RowShape(4, 96, 8), regression, share=True, dtype=half)
    alone = computed(data, RowShape(24, 32, 1), regression, share=False, packing=False, dtype=half)
    np.testing.assert_allclose(found[2], alone[2], atol=0.02)
    for _, _, scores in (found, alone):
        assert np.sqrt(np.mean((scores - unshared("ratings")[2]) ** 2)) < 0.03
    np.testing.assert_allclose(found[0], unshared("ratings")[0], rtol=0.02)


def test_bradley_terry_is_the_mean_over_pairs():
    """By numpy from the scores: -log sigmoid(chosen - rejected) of the first attribute."""
    loss, _, scores = unshared("pairs")
    margins = scores[::2, 0].astype(np.float64) - scores[1::2, 0]
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(-margins))), rtol=1e-5)


def test_pairs_stay_in_one_row_whether_they_share_or_not():
    data = as_pairs(with_labels(*FIXED))
    for share in (True, False):
        for packing in (True, False):
            shape = row_shape(data, rows=2, length=96, packing=packing, share=share)
            assert shape.slots % 2 == 0
            batches = evaluation_batches(data, shape, packing=packing, share=share)
            seen = []
            for batch in batches:
                assert isinstance(batch.targets, Targets)
                there = batch.targets.pairs.weights > 0
                samples = np.asarray(batch.samples)
                pairs = jax.tree.map(np.asarray, batch.targets.pairs)
                chosen = np.take_along_axis(samples, pairs.chosen, -1)[there]
                rejected = np.take_along_axis(samples, pairs.rejected, -1)[there]
                np.testing.assert_array_equal(rejected, chosen + 1)
                seen.extend(chosen)
                assert (samples >= 0).sum() == 2 * there.sum()
            assert sorted(seen) == list(range(0, len(data), 2))


def ranked(responses=4, prompts=3):
    """Every two responses to each prompt as a pair, the earlier one better; and their numbers."""
    tokens, of = siblings(np.random.default_rng(7), [responses] * prompts, (8, 20), (3, 12))
    pairs, better = [], []
    for prompt in range(prompts):
        own = [i for i, p in enumerate(of) if p == str(prompt)]
        better += list(itertools.combinations(own, 2))
        pairs += [(tokens[i], prompt) for pair in itertools.combinations(own, 2) for i in pair]
    data = as_pairs(with_labels([tokens for tokens, _ in pairs], [prompt for _, prompt in pairs]))
    strengths = np.repeat(1 + np.arange(len(better)) % 3, 2).astype(np.float32)
    return dataclasses.replace(data, strengths=strengths), tokens, of, np.asarray(better)


@pytest.mark.parametrize("length", [128, 48], ids=["whole", "divided"])
def test_a_response_in_several_pairs_is_computed_once(length):
    """Loss by numpy from scores of each response alone; gradients of pairs each in its own row."""
    data, tokens, of, better = ranked()
    objective = make_objective("scaled_bradley_terry", tuple("abcde"), PreferenceConfig())
    found = computed(data, RowShape(4, length, 12), objective, share=True)
    paired = computed(data, RowShape(18, 64, 2), objective, share=False, packing=False)
    for path, theirs in paired[1].items():
        error = np.linalg.norm(found[1][path] - theirs) / np.linalg.norm(theirs)
        assert error < 3e-6, (path, error)
    once = with_labels(tokens, of)
    alone = computed(once, RowShape(12, 64, 1), regression, share=False, packing=False)[2]
    margins = np.subtract(*alone[better, 0].astype(np.float64).T)
    by_hand = np.mean(data.strengths[::2] * np.log1p(np.exp(-margins)))
    np.testing.assert_allclose(found[0], by_hand, rtol=1e-6)

    batches = training_batches(data, [np.arange(len(data))], RowShape(4, length, 12))
    assert len(batches.samples(0)) == len(data) == 36
    count = len(batches.computed(0))
    assert count == 12 if length == 128 else 12 < count < 36
    held = evaluation_batches(data, RowShape(4, length, 12))
    sharding, start, _, score = program(objective, None, "none", "float32")
    scores = score_data(score, start().params, held, sharding)
    order = [tokens[i] for pair in better for i in pair]
    assert all(np.array_equal(data.sequence(i), order[i]) for i in range(36))
    np.testing.assert_allclose(scores, alone[better.ravel()], atol=1e-5)


def test_a_policy_imitates_a_response_as_often_as_it_is_chosen():
    data, *_ = ranked(responses=3, prompts=1)  # a > b, a > c, b > c
    data = dataclasses.replace(data, spoken=np.ones(len(data.tokens), bool), attributes=(),
                               labels=np.zeros((6, 0), np.float32))  # fmt: skip
    spoken = data.spoken
    assert spoken is not None
    spoken[data.offsets[:-1]] = False
    data = dataclasses.replace(data, shared=np.zeros(6, np.int32))
    targets: Any = training_batches(data, [np.arange(6)], RowShape(1, 128, 8))[0].targets
    np.testing.assert_array_equal(targets.responses.imitated[0, 0, :4], [2, 1, 0, 0])
    pairs = [x[0, 0][targets.pairs.weights[0, 0] > 0].tolist() for x in targets.pairs[:2]]
    assert pairs == [[0, 0, 1], [1, 2, 2]]


def test_sharing_needs_fewer_places():
    data = with_labels(*FIXED)
    plan = plan_steps(data, batch_size=24, seed=0, epochs=1)
    shared, plain = (
        training_batches(data, plan, row_shape(data, rows=1, length=64, share=share), share=share)
        for share in (True, False)
    )
    first = np.diff(data.prompt_ids, prepend=-1) != 0
    spared = data.shared[~first].sum()
    assert plain.tokens(0) == data.lengths.sum()
    assert shared.tokens(0) == data.lengths.sum() - spared
    assert shared.padded_tokens(0) < plain.padded_tokens(0)
