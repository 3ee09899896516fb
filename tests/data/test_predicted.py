"""The places that predict the assistant's tokens, in rows of any layout."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.assistant_tokens import most_shared
from rmjax.data.batches import make_batch
from rmjax.data.planning import plan_rows, row_shape
from rmjax.data.predicted import at_predecessors, predicting
from rmjax.data.row_layout import RowShape, Segment, make_rows
from rmjax.data.tokenized import TokenizedData, in_memory, join, subset
from rmjax.errors import UserError
from rmjax.models.attention.mask import Layout, allowed
from rmjax.models.inputs import Rows


def dialogues(rng, sizes) -> tuple[TokenizedData, np.ndarray, list, list]:
    """Prompts with several responses, some of which begin alike, and several turns in some."""
    tokens, spoken, prompts = [], [], []
    for number, size in enumerate(sizes):
        prompt = rng.integers(1, 9, rng.integers(1, 12))
        said = np.zeros(len(prompt), bool)
        if len(prompt) > 6:
            said[2:4] = rng.random() < 0.5  # an earlier turn of the assistant
        for _ in range(size):
            own = rng.integers(1, 3, rng.integers(1, 8))
            tokens.append(np.concatenate([prompt, own]).astype(np.int32))
            spoken.append(np.concatenate([said, rng.random(len(own)) < 0.8]))
            spoken[-1][len(prompt)] = True
            prompts.append(str(number))
    return *in_memory(tokens, prompts, spoken), tokens, spoken


def in_rows(
    data: TokenizedData, shape: RowShape, *, share: bool, packing: bool
) -> tuple[Rows, np.ndarray]:
    planned = plan_rows(data, np.arange(len(data)), shape, packing=packing, share=share)
    batch = make_batch(data, planned, shape, -(-len(planned) // shape.rows), share)

    def rows_of(x):
        return np.asarray(x).reshape(-1, *x.shape[2:])

    return jax.tree.map(rows_of, batch.rows), rows_of(batch.samples)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    share=st.booleans(),
    packing=st.booleans(),
    align=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 999),
)
def test_each_spoken_token_is_predicted_once_from_what_stands_before_it(
    sizes, share, packing, align, seed
):
    """From rows and mask alone: what a place sees, with what follows it, is a sample so far."""
    data, order, tokens, spoken = dialogues(np.random.default_rng(seed), sizes)
    shape = row_shape(data, rows=2, length=128, packing=packing, share=share, align=align)
    rows, samples = in_rows(data, shape, share=share, packing=packing)
    wanted = predicting(data, samples, rows)
    layout = Layout(rows.segment_ids, rows.masked_start, rows.masked_end)
    mask = np.asarray(allowed(layout, 0, 128))
    found = []
    for row, place in np.argwhere(wanted):
        seen = rows.tokens[row][mask[row, place]]
        found.append((*seen.tolist(), int(rows.tokens[row, place + 1])))
    expected = [
        tuple(tokens[i][: k + 1].tolist()) for i in order for k in np.flatnonzero(spoken[i])
    ]
    assert sorted(found) == sorted(expected)


def test_a_row_by_hand():
    """A prompt 5 6 7 with two responses that begin alike, and a sample by itself."""
    samples = [np.asarray(t, np.int32) for t in ([5, 6, 7, 1, 2], [5, 6, 7, 1], [9, 8])]
    spoken = [np.asarray(s, bool) for s in ([0, 0, 0, 1, 1], [0, 0, 0, 1], [0, 1])]
    data, _ = in_memory(samples, ["a", "a", "b"], spoken)
    assert data.shared.tolist() == [2, 2, 0]
    segments = [Segment(samples[:2], 2), Segment(samples[2:])]
    rows = make_rows([segments], 1, RowShape(1, 10, 4))
    slots = np.asarray([[0, 1, 2, -1]])
    #                                     5  6 | 7  1  2 | 7  1 || 9  8
    np.testing.assert_array_equal(rows.tokens[0], [5, 6, 7, 1, 2, 7, 1, 9, 8, 0])
    np.testing.assert_array_equal(predicting(data, slots, rows)[0], [0, 0, 1, 1, 0, 1, 0, 1, 0, 0])
    values = [np.asarray(v, np.float32) for v in ([0, 0, 0, 3, 4], [0, 0, 0, 5], [0, 6])]
    found = at_predecessors(values.__getitem__, slots, rows, np.float32)
    np.testing.assert_array_equal(found[0], [0, 0, 3, 4, 0, 5, 0, 6, 0, 0])


def test_what_no_token_predicts_is_an_error():
    with pytest.raises(UserError, match="none of the sample's tokens are the assistant's"):
        most_shared(np.zeros(3, bool))
    with pytest.raises(UserError, match="begin with the sample's first one"):
        most_shared(np.asarray([True, True]))


def test_spoken_tokens_stay_with_their_samples(rng):
    data, order, tokens, spoken = dialogues(rng, [2, 3, 1])
    part = subset(data, np.asarray([4, 1]))
    for new, old in enumerate((1, 4)):
        np.testing.assert_array_equal(part.sequence(new), tokens[order[old]])
        np.testing.assert_array_equal(part.spoken_in(new), spoken[order[old]])
    both = join(data, part)
    np.testing.assert_array_equal(both.spoken_in(len(data) + 1), data.spoken_in(4))
