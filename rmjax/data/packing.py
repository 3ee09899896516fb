"""Bin packing, best-fit decreasing: which item goes into which row."""

import bisect
from collections.abc import Callable, Sequence


def pack(
    lengths: Sequence[int],
    row_length: int | Callable[[int], int],
    slots: int,
    samples: Sequence[int] | None = None,
) -> list[list[int]]:
    """Packs items into as few rows as best-fit decreasing finds.

    Args:
      lengths: token positions that each item takes, at most `row_length`.
      row_length: token positions of a row; or a function of an item's length, that gives the length
        of the row that such an item opens.
      slots: the most samples in a row.
      samples: samples of each item, each at most `slots`; 1 if not given.

    Returns:
      The items of each row, by index. Every item is in exactly one row. Ties are broken by index,
      so equal input gives equal rows on every machine.

    Raises:
      ValueError: an item is longer than a row, or has more samples than it has slots.
    """
    counts = [1] * len(lengths) if samples is None else samples
    rows: list[list[int]] = []
    free: list[int] = []  # slots left in each row
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, count = lengths[item], counts[item]
        opened = row_length(length) if callable(row_length) else row_length
        if length > opened:
            raise ValueError(f"item {item} has {length} tokens, a row only {opened}")
        if count > slots:
            raise ValueError(f"item {item} has {count} samples, a row only {slots} slots")
        fit = bisect.bisect_left(open_rows, (length, -1))
        while fit < len(open_rows) and free[open_rows[fit][1]] < count:
            fit += 1
        if fit == len(open_rows):
            room, row = opened, len(rows)
            rows.append([])
            free.append(slots)
        else:
            room, row = open_rows.pop(fit)
        rows[row].append(item)
        free[row] -= count
        if free[row] and room > length:
            bisect.insort(open_rows, (room - length, row))
    return rows
