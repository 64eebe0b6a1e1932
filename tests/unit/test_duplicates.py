from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.core.conversation import Message
from qlora.data import duplicates
from qlora.data.duplicates import KEY_BITS, Leakage, SeenKeys, normalised


def keys_of(messages: list[Message]) -> tuple[int, int]:
    return duplicates.keys_of(tuple(message["role"] for message in messages), [normalised(message["content"]) for message in messages])


def talk(*contents: str, system: str | None = None) -> list[Message]:
    opening = [Message(role="system", content=system)] if system else []
    return [*opening, *(Message(role=("user", "assistant")[place % 2], content=content) for place, content in enumerate(contents))]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("What is it?", "what IS it?"),
        ("a b", " a\t\n b "),
        ("\uff21\uff22", "ab"),  # full width
        ("\u2460", "1"),  # a number in a circle
        ("stra\u00dfe", "STRASSE"),
        ("e\u0301", "\u00e9"),  # two characters, one letter
        ("\u212b", "\u00e5"),  # the unit and the letter
        ("a\u00a0b", "a b"),
    ],
)
def test_case_width_and_white_space_make_no_difference(text: str, same: str) -> None:
    assert normalised(text) == normalised(same)
    assert keys_of(talk(text, "x")) == keys_of(talk(same, "x"))


@pytest.mark.parametrize(("text", "other"), [("a b", "ab"), ("a", "a."), ("na\u00efve", "naive"), ("1", "2")])
def test_other_texts_are_other_texts(text: str, other: str) -> None:
    assert normalised(text) != normalised(other)
    assert keys_of(talk(text, "x"))[1] != keys_of(talk(other, "x"))[1]


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(max_size=30))
def test_plain_text_is_normalised_like_any_other(text: str) -> None:
    plain = text.encode("ascii", "ignore").decode()
    assert normalised(plain).decode() == normalised(plain + "\u00e9").decode().removesuffix("\u00e9").rstrip(" ") == " ".join(plain.lower().split())


def test_a_prompt_is_all_before_the_last_answer_but_the_system_turn() -> None:
    assert keys_of(talk("a", "b"))[1] == keys_of(talk("a", "c"))[1] == keys_of(talk("a", "b", system="s"))[1]
    assert keys_of(talk("a", "b", "c", "d"))[1] not in {keys_of(talk("a", "b"))[1], keys_of(talk("c", "d"))[1]}


def test_an_unanswered_question_is_its_own_prompt() -> None:
    assert keys_of(talk("a"))[1] == keys_of(talk("a", "b"))[1] != keys_of(talk("c"))[1]
    assert keys_of([]) == keys_of([])


def test_a_conversation_is_every_turn_with_its_role() -> None:
    whole = [keys_of(messages)[0] for messages in (talk("a", "b"), talk("a", "c"), talk("a", "b", system="s"), talk("b", "a"), talk("a b"))]
    assert len(set(whole)) == 5


def test_a_key_fits_its_bits() -> None:
    assert all(0 <= key < 2**KEY_BITS for number in range(100) for key in keys_of(talk(str(number), "x")))


@pytest.mark.parametrize("batches", [[[1, 2, 1, 3, 2]], [[1, 2], [1, 3, 2]], [[1], [2], [1], [3], [2]]])
def test_every_key_but_the_first_is_repeated_however_they_come(batches: Sequence[Sequence[int]]) -> None:
    seen = SeenKeys()
    found = [batch[position] for batch in batches for position in seen.repeated(batch)]
    assert found == [1, 2]


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(0, 9).map(lambda number: number << 40) | st.integers(0, 2**KEY_BITS - 1), max_size=60), max_size=8))
def test_the_table_of_keys_knows_what_a_set_knows(batches: list[list[int]]) -> None:
    """Keys that differ in high bits alone all want one place."""
    table, seen = SeenKeys(), set[int]()
    for batch in batches:
        expected = []
        for position, key in enumerate(batch):
            if key in seen:
                expected.append(position)
            seen.add(key)
        assert table.repeated(batch) == expected


def test_the_table_of_keys_forgets_none_when_it_grows() -> None:
    table = SeenKeys()
    keys = [(number * 0x9E3779B97F4A7C15) % 2**KEY_BITS for number in range(50_000)]
    assert [table.repeated(keys[start : start + 1000]) for start in range(0, 50_000, 1000)] == [[]] * 50
    assert table.repeated(keys[::-1]) == list(range(50_000))
    assert table.repeated(range(20_000)) == [0]
    assert table.repeated([]) == []


def test_leaked_prompts_are_listed_with_both_places() -> None:
    leakage = Leakage()
    leakage.add_test([7, 8, 7], [1, 2, 3], Path("test"))
    assert leakage.leaked([1, 2]) == []
    assert leakage.leaked([1, 7, 7]) == [1, 2]
    leakage.add_leak(7, 2, Path("train"))
    leakage.add_leak(7, 3, Path("train"))
    assert leakage.leaked_test_rows == 2
    assert leakage.listed() == "  test: row 1, test: row 3 = train: row 2"
    leakage.add_test(list(range(100, 120)), list(range(20)), Path("more"))
    for prompt in range(100, 115):
        leakage.add_leak(prompt, prompt, Path("train"))
    assert leakage.listed().splitlines()[1] == "  more: row 0 = train: row 100"
    assert leakage.listed().splitlines()[-1] == "  and 6 more"
