"""Every format is tried on its fixture; a format without one fails here."""

from typing import Any, get_args

import pytest

from qlora.core.conversation import Message
from qlora.data.formats import FORMATS, recognised
from qlora.data.formats.turns import UnsupportedTurnError
from qlora.params.data import DataParams

EXPECTED = [Message(role="user", content="2+2?"), Message(role="assistant", content="4")]
FIXTURES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"content": "2+2?", "role": "user", "name": "Ana"}, {"content": "4", "role": "assistant"}], "other": 1},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1.0}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_the_same_messages_in_every_format(name: str) -> None:
    assert FORMATS[name].to_messages(FIXTURES[name]) == EXPECTED
    assert set(FORMATS[name].columns) <= set(FIXTURES[name])


def test_every_format_can_be_chosen() -> None:
    assert get_args(DataParams.model_fields["format"].annotation) == tuple(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_recognised_by_its_columns_as_its_format_and_no_other(name: str) -> None:
    assert recognised(list(FIXTURES[name])) == [name]


def test_a_system_text_opens_the_conversation_in_every_format_that_has_one() -> None:
    system = Message(role="system", content="Be brief.")
    rows = {name: {**FIXTURES[name], "system": "Be brief."} for name in ("sharegpt", "alpaca")}
    for name, row in rows.items():
        assert FORMATS[name].to_messages(row) == [system, *EXPECTED]
        assert FORMATS[name].to_messages({**row, "system": " "}) == EXPECTED
        assert FORMATS[name].to_messages({**row, "system": None}) == EXPECTED


def test_alpaca_joins_instruction_and_input_and_puts_history_first() -> None:
    row = {"instruction": "Translate.", "input": "Hallo", "output": "Hello", "history": [["1+1?", "2"]]}
    assert [message["content"] for message in FORMATS["alpaca"].to_messages(row)] == ["1+1?", "2", "Translate.\n\nHallo", "Hello"]
    with pytest.raises(ValueError, match=r"history\[0\] is \['1\+1\?'\], expected \[question, answer\]"):
        FORMATS["alpaca"].to_messages({**row, "history": [["1+1?"]]})


def test_prompt_and_completion_may_be_messages() -> None:
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
    assert FORMATS["prompt_completion"].to_messages(row) == EXPECTED
    with pytest.raises(ValueError, match=r"completion is \[.*\] \(list\), expected text"):
        FORMATS["prompt_completion"].to_messages({**row, "prompt": "2+2?"})


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}]}
    assert FORMATS["messages"].to_messages(row) == EXPECTED


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("messages", {"messages": [{"role": "tool", "content": "4"}]}, "tool_turn"),
        ("messages", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "tool_turn"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "tool_turn"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
        ("messages", {"messages": [{"role": "user", "content": "look"}], "images": ["x"]}, "image"),
        ("sharegpt", {"conversations": [{"from": "observation", "value": "4"}]}, "tool_turn"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "image"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "What?"}], "image": "a.jpg"}, "image"),
        ("prompt_completion", {"prompt": [{"role": "tool", "content": "4"}], "completion": []}, "tool_turn"),
    ],
)
def test_tool_turns_and_images_are_refused_by_name(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedTurnError) as caught:
        FORMATS[name].to_messages(row)
    assert caught.value.reason == reason


def test_unused_tool_columns_and_empty_images_are_no_reason() -> None:
    row = {"messages": [{**message, "tool_calls": None} for message in EXPECTED], "images": []}
    assert FORMATS["messages"].to_messages(row) == EXPECTED


@pytest.mark.parametrize(
    ("name", "row", "place"),
    [
        ("messages", {"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\] has 'from', 'value', expected 'role' and 'content'"),
        ("sharegpt", {"conversations": [{"role": "user", "content": "a"}]}, r"conversations\[0\] is .*, expected \{'from'"),
        ("sharegpt", {"conversations": "a"}, "conversations is 'a'"),
        ("alpaca", {"instruction": 5, "output": "b"}, r"instruction is 5 \(int\)"),
        ("alpaca", {"instruction": "a", "output": "b", "history": 5}, r"history is 5, expected a list"),
        ("prompt_completion", {"prompt": "a", "completion": 5}, r"completion is 5 \(int\)"),
        ("messages", {"messages": [{"role": "user", "content": ["a"]}]}, r"messages\[0\].content\[0\] is 'a'"),
    ],
)
def test_a_row_of_another_form_is_named(name: str, row: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        FORMATS[name].to_messages(row)


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


def test_a_speaker_is_known_in_any_case() -> None:
    turns = [{"from": speaker, "value": "a"} for speaker in ("System", "Human", "GPT")]
    assert [message["role"] for message in FORMATS["sharegpt"].to_messages({"conversations": turns})] == ["system", "user", "assistant"]
