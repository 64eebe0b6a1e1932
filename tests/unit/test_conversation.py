from pathlib import Path

import pytest

from qlora.core.conversation import Conversation, Message, invalid_reason, read_conversations, with_system_message
from qlora.core.errors import InputError


def turns(roles: str, content: str = "x") -> list[Message]:
    """Messages from letters: s system, u user, a assistant, w a role that does not exist."""
    names = {"s": "system", "u": "user", "a": "assistant", "w": "wizard"}
    return [Message(role=names[role], content=content) for role in roles]


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suauaua"])
def test_alternating_turns_that_end_on_the_assistant_are_valid(roles: str) -> None:
    assert invalid_reason(turns(roles)) is None


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("", "no_messages"),
        ("wa", "unknown_role"),
        ("usa", "system_not_first"),
        ("ssua", "system_not_first"),
        ("uua", "roles_do_not_alternate"),
        ("au", "roles_do_not_alternate"),
        ("sa", "roles_do_not_alternate"),
        ("uaa", "roles_do_not_alternate"),
        ("uau", "no_final_answer"),
        ("s", "no_final_answer"),
        ("u", "no_final_answer"),
    ],
)
def test_every_fault_has_a_name(roles: str, reason: str) -> None:
    assert invalid_reason(turns(roles)) == reason


@pytest.mark.parametrize("content", ["", " ", "\n\t"])
def test_a_turn_without_text_is_a_fault(content: str) -> None:
    assert invalid_reason([*turns("u"), Message(role="assistant", content=content)]) == "empty_content"


def test_a_system_message_is_added_only_where_there_is_none() -> None:
    bare, own = turns("ua"), turns("sua")
    assert with_system_message(bare, "hi") == [Message(role="system", content="hi"), *bare]
    assert with_system_message(own, "hi") is own
    assert with_system_message(bare, None) is bare
    assert bare == turns("ua")


def test_assistant_turns_are_places_in_the_messages() -> None:
    assert list(Conversation("1", "c", turns("suaua")).assistant_turns()) == [2, 4]


@pytest.mark.parametrize("messages", ['["user"]', '"user"', '[{"role": "user"}]', '[{"role": "user", "content": 5}]', "[null]", "5"])
def test_a_file_of_other_things_than_turns_is_refused(tmp_path: Path, messages: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(f'{{"id": "a", "category": "b", "messages": {messages}}}\n', encoding="utf-8")
    with pytest.raises(InputError, match="prepared-unreadable"):
        read_conversations(path)
