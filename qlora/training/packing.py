"""Whole conversations side by side in rows of tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

WINDOW = 4096
"""Conversations that are packed together. Rows depend on nothing beyond their window, and so on no number of processes."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, window by window: which conversations share a row of `capacity` tokens.

    Each conversation, the longest first, goes to the fullest row that still has room for it. No conversation is parted.
    Within one window that takes at most 11/9 of the fewest rows, plus one (D. S. Johnson, Near-optimal bin packing algorithms, 1973). Each window is
    packed alone, so the bound holds per window, not for the whole: long conversations in one window and short ones in the next never share a row.

    Args:
        lengths: Tokens of each conversation, none above capacity.
        capacity: Tokens of a row.

    Returns:
        Positions in `lengths` for each row; rows in the order of their first conversation.

    >>> pack([3, 5, 2, 5], capacity=8)
    [[0, 1], [2, 3]]
    """
    windows = range(0, len(lengths), WINDOW)
    return [row for start in windows for row in _pack_window(lengths[start : start + WINDOW], capacity, start)]


def _pack_window(lengths: Sequence[int], capacity: int, start: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a row, and the row, sorted
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        length = lengths[position]
        fullest = bisect_left(room, (length, 0))
        left, row = room.pop(fullest) if fullest < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(start + position)
        insort(room, (left - length, row))
    return sorted(sorted(row) for row in rows)
