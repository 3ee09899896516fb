"""Which sequences of tokens should share what they begin with."""

import itertools
from collections.abc import Sequence

import numpy as np

from rmjax.data.row_layout import common_prefix

_MOST = 64  # sequences that share one prefix
_WORTH = 4  # a prefix is shared if it is at least this part of the shorter sequence: one of so many


def prefix_groups(tokens: Sequence[np.ndarray]) -> list[list[int]]:
    """Divides sequences into groups so that few tokens are computed.

    A group computes what all of its sequences begin with once. Only tokens decide: neither does it
    matter where a prompt ends, nor in which order the sequences come.

    Sequences are sorted, so that those with a long common prefix are neighbours, and groups are
    runs of neighbours. The best division of the first n of them follows from the best divisions of
    fewer, for every possible last group. A short prefix, such as a template's first tokens, is not
    shared: small groups fill rows better.

    Args:
      tokens: each int32 [length], all different.

    Returns:
      The numbers of the sequences of each group.
    """
    order = sorted(range(len(tokens)), key=lambda i: tokens[i].astype(">i4").tobytes())
    shared = [_worth_sharing(tokens[a], tokens[b]) for a, b in itertools.pairwise(order)]
    saved, begins = [0], [0]  # by the first n sequences, and where their last group begins
    for end in range(1, len(order) + 1):
        best, begin, prefix = saved[end - 1], end - 1, None
        for first in range(end - 2, max(end - _MOST, 0) - 1, -1):
            prefix = shared[first] if prefix is None else min(prefix, shared[first])
            if not prefix:
                break
            total = saved[first] + prefix * (end - 1 - first)
            if total > best:
                best, begin = total, first
        saved.append(best)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def _worth_sharing(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the prefix that two sequences share; 0 if that is too short to be of use."""
    length = common_prefix([one, other])
    return length if _WORTH * length >= min(len(one), len(other)) else 0
