"""Every format is tried on its fixture; a format without one fails here."""

from typing import Any

import pytest

from qlora.conversation import Message
from qlora.formats import FORMATS

EXPECTED = [Message(role="user", content="2+2?"), Message(role="assistant", content="4")]
FIXTURES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"content": "2+2?", "role": "user", "name": "Ana"}, {"content": "4", "role": "assistant"}], "other": 1},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_the_same_messages_in_every_format(name: str) -> None:
    assert FORMATS[name].to_messages(FIXTURES[name]) == EXPECTED
    assert set(FORMATS[name].columns) <= set(FIXTURES[name])


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ("text", "messages is 'text'"),
        (["text"], r"messages\[0\] is 'text'"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5 \(int\)"),
        ([{"role": "user", "content": "a"}, {"role": ["assistant"], "content": "b"}], r"messages\[1\].role is \['assistant'\]"),
    ],
)
def test_messages_of_another_type_are_named(messages: Any, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        FORMATS["messages"].to_messages({"messages": messages})


@pytest.mark.parametrize("row", [{"messages": None}, {"messages": []}])
def test_null_and_empty_messages_become_no_messages(row: dict[str, Any]) -> None:
    assert FORMATS["messages"].to_messages(row) == []
