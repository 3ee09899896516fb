import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.data.prefix_groups import prefix_groups

SEQUENCES = st.lists(st.tuples(*[st.integers(1, 2)] * 6), min_size=1, max_size=6, unique=True)


def common(sequences):
    """Tokens that all begin with, and that leave each at least one of its own."""
    length = 0
    while all(len(s) > length + 1 for s in sequences) and len({s[length] for s in sequences}) == 1:
        length += 1
    return length


def computed(groups):
    """Tokens to compute; a prefix counts if it is worth sharing for every two in a group."""
    total = 0
    for group in groups:
        worth = all(
            4 * common(pair) >= min(map(len, pair)) for pair in itertools.combinations(group, 2)
        )
        shared = common(group) if worth else 0
        total += sum(map(len, group)) - shared * (len(group) - 1)
    return total


def divisions(items):
    """All ways to cut a list into runs."""
    for cuts in itertools.product((False, True), repeat=len(items) - 1):
        ends = [i for i, cut in enumerate(cuts, start=1) if cut]
        yield [items[a:b] for a, b in itertools.pairwise([0, *ends, len(items)])]


@settings(max_examples=200, deadline=None)
@given(sequences=SEQUENCES)
def test_no_other_division_of_the_sorted_list_computes_fewer_tokens(sequences):
    tokens = [np.asarray(s, np.int32) for s in sequences]
    groups = prefix_groups(tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    found = computed([[sequences[i] for i in group] for group in groups])
    assert found == min(map(computed, divisions(sorted(sequences))))


def test_a_templates_first_tokens_are_not_shared():
    header, rng = [1, 2, 3], np.random.default_rng(0)
    tokens = [np.asarray([*header, *rng.integers(10, 99, 50)], np.int32) for _ in range(20)]
    assert all(len(group) == 1 for group in prefix_groups(tokens))
