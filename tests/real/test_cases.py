"""Rows as people have them, each file with the outcome that it should have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import params
from qlora.core.conversation import Conversation
from qlora.core.errors import InputError
from qlora.core.files import read_jsonl
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from stages.prepare import prepare
from tests.families import stand_in, stock
from tests.helpers import chat_params
from tests.unit.trainings import changed

Case = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]
SUM = [{"role": "user", "content": "What is 0 plus 0?"}, {"role": "assistant", "content": "It is 0."}]


@pytest.fixture
def case(tmp_path: Path, real_data: Callable[[str], Path]) -> Case:
    """Prepares a file as the train split: its conversations, and the report."""

    def run(name: str, **values: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        source = real_data("../cases") / name
        shutil.copy(source, tmp_path / name)
        test = tmp_path / "test.jsonl"
        test.write_text(
            json.dumps({"messages": [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Yes."}]}), encoding="utf-8"
        )
        if values.get("data__format") == "alpaca":
            test.write_text(json.dumps({"instruction": "Another?", "output": "Yes."}), encoding="utf-8")
        settings = {
            "data__train_file": str(tmp_path / name),
            "data__test_file": str(test),
            "data__validation_fraction": 0.0,
            "data__system_message": None,
            "runtime__num_workers": 1,
            "runtime__progress": False,
            **values,
        }
        changed_params = changed(params.load(Path("params.yaml")), **settings)
        prepare(changed_params, prepared=tmp_path / "prepared", report=tmp_path / "report.json", notes=tmp_path / "notes")
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        return list(read_jsonl(tmp_path / "prepared/train.jsonl")), report

    return run


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("empty_system.jsonl", 3),
        ("conversations_role_content.jsonl", 3),
        ("capital_roles.jsonl", 3),
        ("lines.json", 60),
        ("bom.jsonl", 3),
        ("mixed_content.jsonl", 60),
        ("mixed_content_via_datasets.parquet", 60),
    ],
)
def test_everyday_spellings_are_read_as_what_they_mean(case: Case, name: str, rows: int) -> None:
    found, report = case(name)
    assert len(found) == rows
    assert found[0]["messages"] == SUM
    assert report["train"]["dropped"] == {}
    assert report["ignored"] == {}


def test_one_column_stored_in_two_ways_is_the_same_dataset(case: Case) -> None:
    assert case("mixed_content.jsonl")[0] == case("mixed_content_via_datasets.parquet")[0]


def test_a_blank_instruction_leaves_the_input_as_the_question(case: Case) -> None:
    found, _ = case("alpaca_blank_instruction.jsonl", data__format="alpaca")
    assert found[0]["messages"] == SUM


def test_one_bad_row_is_a_counted_reason(case: Case) -> None:
    found, report = case("one_bad_row.jsonl")
    assert (len(found), report["train"]["dropped"]) == (60, {"wrong_type": 1})


def test_what_was_dropped_is_said_with_its_places(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    found, report = case("ninety_percent_invalid.jsonl")
    assert (len(found), report["train"]["dropped"]) == (40, {"no_final_answer": 360})
    shown = capfd.readouterr()
    assert "ninety_percent_invalid.jsonl: 400 rows, 40 kept, dropped 360 no_final_answer: row 2, 3, 4" in shown.out
    assert "360 of 400 rows of the train split were dropped" in shown.out + shown.err


def encoded(template: ChatTemplate, record: dict[str, Any]) -> list[str]:
    """What is learned of a prepared row."""
    found = template.encode(Conversation.from_record(record))
    return [template.tokenizer.decode(row.ids[start:end]) for row, (start, end) in found.answers()]


def test_an_answer_of_weight_0_is_shown_and_not_learned(case: Case) -> None:
    found, _ = case("weight0.jsonl")
    template = ChatTemplate(load_tokenizer(Path("models/base/tiny")), chat_params())
    for record in found:
        (learned,) = encoded(template, record)
        assert learned.startswith("It is ")
        assert "WRONG" not in learned
    (row,) = template.encode(Conversation.from_record(found[0])).rows
    assert "WRONG It is 0." in template.tokenizer.decode(row.ids)


def qwen3(real_data: Callable[[str], Path]) -> ChatTemplate:
    """The real tokenizer with the stock template."""
    tokenizer = load_tokenizer(real_data("tokenizers/qwen3"))
    tokenizer.chat_template = stock()["qwen3"]
    return ChatTemplate(tokenizer, chat_params())


def test_reasoning_is_learned_or_refused_by_name(case: Case, real_data: Callable[[str], Path]) -> None:
    found, _ = case("reasoning_content.jsonl")
    assert encoded(qwen3(real_data), found[0]) == ["<think>\n0 times four\n</think>\n\nIt is 0.<|im_end|>"]
    llama = stand_in("llama3_1", stock()["llama3_1"])
    with pytest.raises(InputError, match=r"\[chat-text-lost\] .*leaves out the reasoning"):
        encoded(ChatTemplate(llama, chat_params()), found[0])
    assert ChatTemplate(llama, chat_params(), on_invalid="drop").encode(Conversation.from_record(found[0])).dropped == "not_rendered"


def test_tools_are_shown_or_refused_by_name(case: Case, real_data: Callable[[str], Path]) -> None:
    found, _ = case("tools_column.jsonl")
    template = qwen3(real_data)
    (row,) = template.encode(Conversation.from_record(found[0])).rows
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in template.tokenizer.decode(row.ids)
    gemma = stand_in("gemma3", stock()["gemma3"])
    with pytest.raises(InputError, match=r"\[chat-text-lost\] .*leaves out the definitions of the row's tools"):
        encoded(ChatTemplate(gemma, chat_params()), found[0])


CALL = {"name": "add", "arguments": {"a": 2, "b": 'two "2"'}}
OPENAI = [
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
]
SHAREGPT = [
    {"from": "human", "value": "What is 2 plus 2?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "It is 4."},
]


@pytest.mark.parametrize("family", ["qwen3", "llama3_1"])
def test_calls_of_both_formats_give_the_same_tokens(family: str, tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    template = qwen3(real_data) if family == "qwen3" else ChatTemplate(stand_in(family, stock()[family]), chat_params())
    as_text = json.loads(json.dumps(OPENAI))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["arguments"])
    rows = {
        "openai": {"messages": OPENAI, "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]},
        "text": {"messages": as_text, "tools": json.dumps([{"name": "add", "description": "Adds.", "parameters": {}}])},
        "sharegpt": {"conversations": SHAREGPT, "tools": '[{"name": "add", "description": "Adds.", "parameters": {}}]'},
    }
    learned = []
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row), encoding="utf-8")
        settings = {"data__train_file": str(path), "data__test_file": str(path), "data__validation_fraction": 0.0, "data__test_fraction": 0.001}
        settings |= {"data__system_message": None, "data__format": "sharegpt" if name == "sharegpt" else "messages", "runtime__num_workers": 1}
        other = tmp_path / f"{name}-test.jsonl"
        other.write_text(json.dumps({"messages": SUM}), encoding="utf-8")
        values = changed(params.load(Path("params.yaml")), **settings | {"data__test_file": str(other)}, runtime__progress=False)
        prepare(values, prepared=tmp_path / name, report=tmp_path / f"{name}.json", notes=tmp_path / "notes")
        (record,) = read_jsonl(tmp_path / name / "train.jsonl")
        rows_made = template.encode(Conversation.from_record(record)).rows
        learned.append([(row.ids, row.spans) for row in rows_made])
        answers = encoded(template, record)
        assert "add" in answers[0]
        assert 'two \\"2\\"' in answers[0]
        assert answers[1].endswith(f"It is 4.{template.tokenizer.decode([template.end_of_turn])}")
    assert learned[0] == learned[1] == learned[2]
