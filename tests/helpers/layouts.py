"""Rows of groups, laid out by numpy, with what each token sees written down sample by sample."""

import numpy as np

from rmjax.models.attention.mask import Layout

Group = tuple[int, list[int]]  # tokens of the shared beginning, and each sample's own


def make_layout(
    rows: list[list[Group]], length: int, unit: int, window: int | None = None
) -> tuple[Layout, np.ndarray]:
    """The layout of rows, every part at a multiple of `unit`, and who sees whom, [B, L, L].

    With a window, of a sample's tokens the last `window` up to each.
    """
    arrays = np.zeros((3, len(rows), length), np.int32)
    segment_ids, masked_start, masked_end = arrays
    positions = np.zeros((len(rows), length), np.int32)
    seen = np.zeros((len(rows), length, length), bool)
    causal = np.tri(length, dtype=bool)
    for row, groups in enumerate(rows):
        place = 0
        for number, (shared, own) in enumerate(groups, start=1):
            common = np.zeros(length, bool)
            common[place : place + shared] = True
            seen[row] |= causal & common & common[:, None]
            segment_ids[row, common] = number
            positions[row, common] = np.arange(shared)
            place = end = -(-(place + shared) // unit) * unit
            for size in own:
                mine = np.zeros(length, bool)
                mine[place : place + size] = True
                assert mine.sum() == size, "the row is too short for its groups"
                seen[row] |= causal & (mine | common) & mine[:, None]
                segment_ids[row, mine] = number
                positions[row, mine] = np.arange(shared, shared + size)
                masked_start[row, mine], masked_end[row, mine] = end, place
                place = -(-(place + size) // unit) * unit
    if window is None:
        return Layout._make([*arrays, None, None]), seen
    far = positions[:, :, None] - positions[:, None, :] >= window
    first = np.maximum(positions - window + 1, 0)
    return Layout._make([*arrays, positions, first]), seen & ~far


def random_rows(rng: np.random.Generator, count: int, length: int, unit: int) -> list[list[Group]]:
    """Groups of all sizes; some rows are full, some end early, some are empty."""
    rows = []
    for _ in range(count):
        left, groups = length - int(rng.integers(0, length + 1)) * int(rng.integers(0, 2)), []
        while left > unit:
            shared = int(rng.integers(0, max(1, left // 2)))
            own = [int(n) for n in rng.integers(1, 1 + max(1, left // 2), rng.integers(1, 4))]
            taken = sum(-(-n // unit) * unit for n in (shared, *own))
            if taken > left:
                break
            groups.append((shared, own))
            left -= taken
        rows.append(groups)
    return rows


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, cap: float | None = None
) -> np.ndarray:
    """Attention in float64 by its definition; 0 where nothing is seen.

    With a cap c, logits x are c tanh(x / c).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads = np.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    logits = np.einsum("bqnh,bknh->bnqk", q, k[:, :, heads]) / np.sqrt(q.shape[-1])
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * seen[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnqk,bknh->bqnh", weights, v[:, :, heads])


def dense_gradients(
    q, k, v, seen, cotangent, cap=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the sum of `dense` times `cotangent` by q, k and v, written out, in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    heads = np.arange(q.shape[2]) // groups
    wide_k, wide_v = k[:, :, heads], v[:, :, heads]
    logits = np.einsum("bqnh,bknh->bnqk", q, wide_k) * scale
    slope = 1.0
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * seen[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    by_weights = np.einsum("bqnh,bknh->bnqk", do, wide_v)
    mean = (by_weights * weights).sum(-1, keepdims=True)
    by_logits = weights * (by_weights - mean) * scale * slope

    def summed(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)

    return (
        np.einsum("bnqk,bknh->bqnh", by_logits, wide_k),
        summed(np.einsum("bnqk,bqnh->bknh", by_logits, q)),
        summed(np.einsum("bnqk,bqnh->bknh", weights, do)),
    )
