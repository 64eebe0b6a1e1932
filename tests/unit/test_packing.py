from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.training.packing import WINDOW, pack

SETTINGS = settings(max_examples=200, deadline=None, database=None, derandomize=True)


def test_the_longest_first_each_to_the_fullest_row_with_room() -> None:
    assert pack([3, 5, 2, 5], capacity=8) == [[0, 1], [2, 3]]
    # 2 goes to the row with 6 of 8, not to that with 5.
    assert pack([5, 6, 2], capacity=8) == [[0], [1, 2]]
    assert pack([], capacity=8) == []
    assert pack([8, 8], capacity=8) == [[0], [1]]


@SETTINGS
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_every_conversation_is_in_one_row_with_room_for_it_and_no_two_rows_would_fit_in_one(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in row) for row in rows]
    assert all(total <= capacity for total in filled)
    assert all(one + other > capacity for one, other in combinations(filled, 2))
    assert all(before < after for row in rows for before, after in pairwise(row))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_a_window_does_not_see_the_next() -> None:
    lengths = [number % 97 + 1 for number in range(WINDOW + 500)]
    first, second = pack(lengths[:WINDOW], 200), pack(lengths[WINDOW:], 200)
    assert pack(lengths, 200) == first + [[place + WINDOW for place in row] for row in second]
