"""Which sample goes into which row: best-fit decreasing."""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int, slots: int) -> list[list[int]]:
    """Packs items into as few rows as best-fit decreasing finds.

    Args:
      lengths: tokens of each item, each at most `row_length`.
      row_length: places of a row.
      slots: the most items in a row.

    Returns:
      The items of each row, by index. Every item is in exactly one row. Ties are broken by index,
      so equal input gives equal rows on every machine.

    Raises:
      ValueError: an item is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > row_length:
            raise ValueError(f"item {item} has {length} tokens, a row only {row_length}")
        place = bisect.bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(item)
        if len(rows[row]) < slots and room > length:
            bisect.insort(open_rows, (room - length, row))
    return rows
