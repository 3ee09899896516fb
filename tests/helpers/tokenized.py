"""Tokenized data out of nothing."""

import numpy as np

from rmjax.data.tokenized import TokenizedData, shared_prefixes


def make_data(lengths, groups=None, attributes=2, seed=0):
    """Samples of the given lengths with ratings, some of them missing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (len(lengths), attributes)).astype(np.float32)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    tokens = rng.integers(1, 262, sum(lengths)).astype(np.int32)
    groups = np.asarray(range(len(lengths)) if groups is None else groups, np.int32)
    return TokenizedData(
        attributes=tuple("abcdefgh"[:attributes]),
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=labels,
        prompt_ids=groups,
        prompt_hashes=groups.astype(np.int64),
        shared=shared_prefixes(np.split(tokens, np.cumsum(lengths)[:-1]).__getitem__, groups),
        rows=np.arange(1, len(lengths) + 1, dtype=np.int32),
        chosen=np.zeros(len(lengths), bool),
        strengths=np.full(len(lengths), np.nan, np.float32),
        counts={},
        source="memory",
        key="key",
    )
