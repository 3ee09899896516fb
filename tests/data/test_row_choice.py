import numpy as np
import pytest

from helpers.tokenized import make_data
from rmjax.data import row_choice
from rmjax.data.batches import training_batches
from rmjax.data.planning import plan_steps, row_shape
from rmjax.data.row_choice import RowLimits, choose_shapes
from rmjax.data.row_layout import RowShape
from rmjax.errors import UserError
from rmjax.training.rows import recorded_shapes
from rmjax.training.workdir import recorded_rows


def responses(rng, prompts, most=40):
    """Two to a prompt, each of a length of its own."""
    lengths = rng.integers(8, most, 2 * prompts).tolist()
    return make_data(lengths, np.repeat(np.arange(prompts), 2).tolist())


def chosen(data, plan, limits, **options):
    return choose_shapes(
        data,
        plan,
        int(data.lengths.max()),
        limits,
        lambda rows, length: row_shape(data, rows=rows, length=length),
        **dict(packing=True, share=True) | options,
    )


def computed(data, plan, *shapes):
    batches = training_batches(data, plan, *shapes)
    return sum(batches.padded_tokens(step) for step in range(len(batches)))


@pytest.mark.parametrize("shards", [1, 4])
def test_no_other_length_computes_fewer_places(rng, shards):
    """Every length and number of rows that the limits allow, tried here one by one."""
    data = responses(rng, 60)
    plan = plan_steps(data, batch_size=12, seed=0, epochs=1)
    limits = RowLimits(places=256, least=128, shards=shards, multiple=48)
    (shape,) = chosen(data, plan, limits, most=1)
    others = [
        RowShape(rows * shards, length, row_shape(data, rows=1, length=length).slots)
        for length in (48, 96, 144, 192, 240)
        for rows in (1, 2, 3, 4, 5)
        if 128 <= rows * length <= 256
    ]
    assert shape.length % 48 == 0 and shape.rows % shards == 0
    assert 128 <= shape.rows // shards * shape.length <= 256
    assert computed(data, plan, shape) == min(computed(data, plan, other) for other in others)


def test_few_long_samples_have_rows_of_their_own(rng):
    """The shape that holds them would leave most of the others' steps empty."""
    lengths = np.full(400, 30)
    lengths[200] = 700
    data = make_data(lengths.tolist())
    plan = plan_steps(data, batch_size=10, seed=0, epochs=1)
    limits = RowLimits(places=1024, least=256, shards=1, multiple=16)
    first, *others = chosen(data, plan, limits)
    assert first.length >= 700 > max(shape.length for shape in others)
    batches = training_batches(data, plan, first, *others)
    assert sorted(np.concatenate([batches.samples(step) for step in range(40)])) == list(range(400))
    tokens = sum(batches.tokens(step) for step in range(40))
    assert tokens == lengths.sum() and set(batches.shapes) == {first, *others}
    assert 1 - tokens / computed(data, plan, first, *others) < 0.15
    assert 1 - tokens / computed(data, plan, first) > 0.3
    for step in range(40):  # each in its own shape, whole
        batch = batches[step]
        assert batch.rows.tokens.shape[1:] in {(s.rows, s.length) for s in batches.shapes}
        assert sorted(batch.samples[batch.samples >= 0]) == sorted(plan[step])


def test_rows_are_shorter_where_attention_computes_what_nobody_sees(rng):
    data = responses(rng, 100)
    plan = plan_steps(data, batch_size=40, seed=0, epochs=1)
    plain = RowLimits(places=4096, least=1024, shards=1, multiple=16)
    costly = RowLimits(places=4096, least=1024, shards=1, multiple=16, attention=0.1)
    assert chosen(data, plan, costly)[0].length < chosen(data, plan, plain)[0].length


@pytest.mark.parametrize("length", [12, 30])
def test_small_steps_are_not_padded_to_the_least_that_large_ones_have(length):
    """40 samples of a few tokens a step, where 4,096 places may be computed at once."""
    data = make_data([length] * 40)
    plan = [np.arange(40)]
    limits = RowLimits(places=4096, least=2048, shards=1, multiple=16)
    (shape,) = chosen(data, plan, limits)
    assert 40 * length / (shape.rows * shape.length) > 0.86


def record(limits, recorded, longest=64):
    return recorded_shapes(
        recorded, longest, limits, lambda rows, length: RowShape(rows, length, 4)
    )


def test_a_record_is_kept_where_it_is_within_the_limits():
    limits = RowLimits(places=512, least=256, shards=2, multiple=16)
    kept = record(limits, [[4, 128], [8, 48]])
    assert [(shape.rows, shape.length) for shape in kept] == [(8, 128), (16, 48)]
    assert record(limits, [[1, 1024]])  # a row that long is needed
    assert not record(limits, None)
    assert not record(limits, [[4, 48]])  # too short for the longest sample
    assert not record(limits, [[4, 120]])  # not whole on this mesh
    assert not record(limits, [[5, 128]])  # more at once than there may be now


def test_few_counts_of_rows_are_tried_however_many_there_could_be():
    for places, least in ((1_000_000, 500_000), (40, 20), (16, 16), (3, 2)):
        limits = RowLimits(places=places * 16, least=least * 16, shards=1, multiple=16)
        tried = list(row_choice._rows_at_once(16, limits, 2_000_000))
        assert len(tried) <= 8 and tried[0] == places and tried[-1] == least
        assert tried == sorted(set(tried), reverse=True)
        assert list(row_choice._rows_at_once(16, limits, 2)) == [2]


@pytest.mark.parametrize(
    "rows", ["{}", "5", "[]", "[[1]]", '[["x", 512]]', "[[0, 512]]", "[[1, -16]]"]
)
def test_a_damaged_record_of_rows_is_an_error_that_names_it(tmp_path, rows):
    (tmp_path / "rows.json").write_text(f'{{"rows": {rows}}}')
    with pytest.raises(UserError, match=r"rows\.json: 'rows' is .*delete the file"):
        recorded_rows(tmp_path)
