import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.packing import pack

ROW = 20


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, ROW), max_size=60), slots=st.integers(1, 8))
def test_every_item_is_in_one_row_that_has_room_for_it(lengths, slots):
    rows = pack(lengths, ROW, slots)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < len(row) <= slots for row in rows)
    assert all(sum(lengths[item] for item in row) <= ROW for row in rows)
    assert rows == pack(lengths, ROW, slots)
    array: Any = np.asarray(lengths, np.int64)
    assert rows == pack(array, ROW, slots)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, ROW), max_size=40), slots=st.integers(1, 8))
def test_it_is_best_fit_decreasing(lengths, slots):
    """Against the textbook's loop: longest first, each into the fullest row that takes it."""
    rows, room = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[item] and len(rows[r]) < slots]
        if fits:
            row = min(fits, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(ROW)
        rows[row].append(item)
        room[row] -= lengths[item]
    assert [sorted(lengths[i] for i in row) for row in pack(lengths, ROW, slots)] == [
        sorted(lengths[i] for i in row) for row in rows
    ]


def fewest_rows(lengths):
    """Brute force: the fewest rows, by the best last row of every subset of items."""

    @functools.cache
    def best(subset):  # (rows, tokens in the last one)
        if not subset:
            return (1, 0)
        return min(
            added(*best(subset & ~(1 << item)), length)
            for item, length in enumerate(lengths)
            if subset >> item & 1
        )

    def added(rows, used, length):
        return (rows, used + length) if used + length <= ROW else (rows + 1, length)

    return best(2 ** len(lengths) - 1)[0]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=8))
def test_it_is_within_its_proven_bound_of_the_fewest_rows(lengths):
    """Best-fit decreasing takes at most 11/9 of them and 6/9 (Dosa, Li, Han & Tuza 2013)."""
    assert len(pack(lengths, ROW, len(lengths))) <= 11 / 9 * fewest_rows(lengths) + 6 / 9


def test_lengths_like_helpsteer2s_waste_next_to_nothing(rng):
    lengths = np.clip(rng.lognormal(6.1, 0.6, 2000).astype(int), 20, 4096)
    rows = pack(lengths.tolist(), 4096, 32)
    assert len(rows) <= math.ceil(lengths.sum() / 4096 * 1.01)


def test_no_items_need_no_rows():
    assert pack([], ROW, 4) == []


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="item 1 has 21 tokens, a row only 20"):
        pack([3, 21], ROW, 4)
