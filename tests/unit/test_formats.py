"""Every format is tried on its fixture; a format without one fails here."""

import json
from collections import Counter
from typing import Any, get_args

import pytest

from qlora.core.conversation import Message
from qlora.data.formats import FORMATS, recognised
from qlora.data.formats.turns import UnsupportedTurnError, tools_of
from qlora.data.readers import Columns
from qlora.params.data import DataParams

EXPECTED = [Message(role="user", content="2+2?"), Message(role="assistant", content="4")]
FIXTURES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"content": "2+2?", "role": "user", "name": "Ana"}, {"content": "4", "role": "assistant"}], "other": 1},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1.0}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
}


def read(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row as the readers hand it on."""
    columns = Columns(FORMATS[name].columns, FORMATS[name].optional)
    return {own: row[there[0]] for own, there in columns.found_in(list(row))[0]}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_the_same_messages_in_every_format(name: str) -> None:
    names = FORMATS[name].columns
    assert FORMATS[name].to_messages(read(name, FIXTURES[name])) == EXPECTED
    assert all(set(spellings) & set(FIXTURES[name]) for spellings in names.values())


def test_every_format_can_be_chosen() -> None:
    assert get_args(DataParams.model_fields["format"].annotation) == tuple(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_recognised_by_its_columns_as_its_format_and_no_other(name: str) -> None:
    alike = ["messages", "sharegpt"]
    assert recognised(list(FIXTURES[name])) == (alike if name in alike else [name])


def test_a_system_text_opens_the_conversation_in_every_format_that_has_one() -> None:
    system = Message(role="system", content="Be brief.")
    rows = {name: {**FIXTURES[name], "system": "Be brief."} for name in ("sharegpt", "alpaca", "prompt_completion")}
    for name, row in rows.items():
        assert FORMATS[name].to_messages(read(name, row)) == [system, *EXPECTED]
        assert FORMATS[name].to_messages(read(name, {**row, "system": " "})) == EXPECTED
        assert FORMATS[name].to_messages(read(name, {**row, "system": None})) == EXPECTED


def test_alpaca_joins_instruction_and_input_and_puts_history_first() -> None:
    row = {"instruction": "Translate.", "input": "Hallo", "output": "Hello", "history": [["1+1?", "2"]]}
    assert [message["content"] for message in FORMATS["alpaca"].to_messages(row)] == ["1+1?", "2", "Translate.\n\nHallo", "Hello"]
    with pytest.raises(ValueError, match=r"history\[0\] is \['1\+1\?'\], expected \[question, answer\]"):
        FORMATS["alpaca"].to_messages({**row, "history": [["1+1?"]]})


def test_prompt_and_completion_may_be_messages() -> None:
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
    assert FORMATS["prompt_completion"].to_messages(row) == EXPECTED
    assert FORMATS["prompt_completion"].to_messages({**row, "system": "s"}) == [Message(role="system", content="s"), *EXPECTED]
    with pytest.raises(ValueError, match=r"completion is \[.*\] \(list\), expected text"):
        FORMATS["prompt_completion"].to_messages({**row, "prompt": "2+2?"})


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}]}
    assert FORMATS["messages"].to_messages(row) == EXPECTED


def test_alpaca_without_an_instruction_asks_the_input_alone() -> None:
    row = {"instruction": " ", "input": "2+2?", "output": "4"}
    assert FORMATS["alpaca"].to_messages(row) == EXPECTED


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("messages", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{"}}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": [1]}}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "input": {"a": 1}}]}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": []}]}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "weight"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
        ("messages", {"messages": [{"role": "user", "content": "look"}], "images": ["x"]}, "image"),
        ("sharegpt", {"messages": [{"from": "function_call", "value": "look it up"}]}, "bad_tool_call"),
        ("sharegpt", {"messages": [{"from": "human", "value": "<image>\nWhat?"}]}, "image"),
        ("sharegpt", {"messages": [{"from": "human", "value": "What?"}], "images": "a.jpg"}, "image"),
    ],
)
def test_what_can_not_be_used_is_refused_by_name(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedTurnError) as caught:
        FORMATS[name].to_messages(row)
    assert caught.value.reason == reason


CALLS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.mark.parametrize(
    "turns",
    [
        CALLS,
        # Arguments as text, null where another call has arguments, and OpenAI's older form.
        [
            CALLS[0],
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
            *CALLS[2:],
        ],
        [
            CALLS[0],
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 2, "city": None}}}]} | {"content": ""},
            *CALLS[2:],
        ],
        [
            CALLS[0],
            {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": {"a": 2, "b": 2}}},
            {**CALLS[2], "role": "function"},
            CALLS[3],
        ],
        # ShareGPT's.
        [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
    ],
)
def test_calls_of_tools_are_kept_in_one_form(turns: list[dict[str, Any]]) -> None:
    assert FORMATS["messages"].to_messages({"messages": turns}) == CALLS


@pytest.mark.parametrize("found", [[{"name": "add"}], '[{"name": "add"}]', [{"type": "function", "function": {"name": "add", "strict": None}}]])
def test_tools_have_one_form(found: Any) -> None:
    function = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert tools_of(found) == [{"type": "function", "function": function}]
    assert tools_of(None) == tools_of("") == tools_of([]) == []
    with pytest.raises(UnsupportedTurnError, match="tools holds"):
        tools_of([{"description": "adds"}])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "content"])
def test_reasoning_is_kept_apart_from_the_answer(key: str) -> None:
    answer = {"content": "4", key: "2 and 2"} if key != "content" else {"content": "<think>\n2 and 2\n</think>\n\n4"}
    messages = FORMATS["messages"].to_messages({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **answer}]})
    assert messages == [EXPECTED[0], {**EXPECTED[1], "reasoning_content": "2 and 2"}]


def test_an_empty_block_of_reasoning_is_none_and_a_person_may_write_the_word() -> None:
    turns = [{"role": "user", "content": "</think>?"}, {"role": "assistant", "content": "<think>\n\n</think>\n\n4"}]
    assert FORMATS["messages"].to_messages({"messages": turns}) == [{"role": "user", "content": "</think>?"}, EXPECTED[1]]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_an_answer_that_is_not_to_be_learned_is_marked(mark: dict[str, Any], keys: tuple[str, str]) -> None:
    turns = [dict(zip(keys, pair, strict=True)) for pair in (("user", "2+2?"), ("assistant", "5"), ("user", "No."), ("assistant", "4"))]
    turns[1] |= mark
    turns[3] |= {"weight": 1, "train": True}
    found = FORMATS["sharegpt"].to_messages({"messages": turns})
    assert [message.get("learn", True) for message in found] == [True, False, True, True]


def test_a_call_of_sharegpt_may_be_left_out_of_what_is_learned() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0, "thinking": "b"}]
    found = FORMATS["sharegpt"].to_messages({"messages": turns})
    assert (found[1]["learn"], found[1]["reasoning_content"]) == (False, "b")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "2+2?", "output": "<think>\nsum\n</think>\n\n4"}),
        ("prompt_completion", {"prompt": "2+2?", "completion": "<think>\nsum\n</think>\n\n4"}),
    ],
)
def test_a_block_of_reasoning_is_read_in_every_format(name: str, row: dict[str, Any]) -> None:
    assert FORMATS[name].to_messages(row) == [EXPECTED[0], {**EXPECTED[1], "reasoning_content": "sum"}]


def test_what_stands_beside_what_is_read_is_counted() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    turn = {"role": "assistant", "content": "a", "reasoning_content": "b", "thinking": "c", "tool_calls": calls, "function_call": calls[0]}
    ignored: Counter[str] = Counter()
    FORMATS["messages"].to_messages({"messages": [turn]}, ignored)
    assert ignored == {"thinking": 1, "function_call": 1}


def test_keys_that_are_not_read_are_counted_unless_they_are_known_to_be_harmless() -> None:
    turns = [{"role": "user", "content": "2+2?", "id": 5, "mood": "good"}, {"role": "assistant", "content": "4", "mood": None, "cache": True}]
    ignored: Counter[str] = Counter()
    assert FORMATS["messages"].to_messages({"messages": turns}, ignored) == EXPECTED
    assert ignored == {"mood": 1, "cache": 1}
    # What an assistant alone may have.
    ignored.clear()
    FORMATS["messages"].to_messages({"messages": [{"role": "user", "content": "a", "thinking": "b", "name": "Ana", "weight": 0}]}, ignored)
    assert ignored == {"thinking": 1, "name": 1}


@pytest.mark.parametrize("written", [json.dumps(EXPECTED), repr(EXPECTED)])
def test_a_list_that_is_written_down_as_text_is_read(written: str) -> None:
    assert FORMATS["messages"].to_messages({"messages": written}) == EXPECTED


def test_a_blank_system_turn_is_none() -> None:
    turns = [{"role": "system", "content": " \n"}, *EXPECTED]
    assert FORMATS["messages"].to_messages({"messages": turns}) == EXPECTED


def test_unused_tool_columns_and_empty_images_are_no_reason() -> None:
    row = {"messages": [{**message, "tool_calls": None} for message in EXPECTED], "images": []}
    assert FORMATS["messages"].to_messages(row) == EXPECTED


@pytest.mark.parametrize(
    ("name", "row", "place"),
    [
        ("messages", {"messages": [{"speaker": "human", "text": "a"}]}, r"messages\[0\] has 'speaker', 'text', expected 'role' and 'content'"),
        ("sharegpt", {"messages": "a"}, "messages is 'a'"),
        ("alpaca", {"instruction": 5, "output": "b"}, r"instruction is 5 \(int\)"),
        ("alpaca", {"instruction": "a", "output": "b", "history": 5}, r"history is 5, expected a list"),
        ("prompt_completion", {"prompt": "a", "completion": 5}, r"completion is 5 \(int\)"),
        ("messages", {"messages": [{"role": "user", "content": [5]}]}, r"messages\[0\].content\[0\] is 5"),
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


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_a_speaker_is_known_in_any_case_and_under_any_name(name: str, keys: tuple[str, str]) -> None:
    spellings = ("System", "Human", "GPT", "USER", "Assistant", "human", "model", "user", "bot", "wizard")
    turns = [dict(zip(keys, (speaker, "a"), strict=True)) for speaker in spellings]
    roles = [message["role"] for message in FORMATS[name].to_messages({"messages": turns})]
    assert roles == ["system", *("user", "assistant") * 4, "wizard"]
    assert FORMATS[name].to_messages({"messages": [dict(zip(keys, ("developer", "a"), strict=True))]})[0]["role"] == "system"
