"""The one Conversation that every input format becomes and every later step reads."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from qlora.core.errors import translate_errors
from qlora.core.files import read_jsonl

ROLES = frozenset(("system", "user", "assistant", "tool"))
CALL = "assistant, calling"
"""Stands for the role of an assistant that calls tools where the order of roles is judged: results may follow it."""

PLAIN_KEYS = 2
"""Of a message whose text is all that it says: role and content."""


class Function(TypedDict):
    """A tool that is called."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """Of an assistant's turn."""

    type: str
    function: Function
    id: NotRequired[str]


Tool = dict[str, Any]
"""A tool's definition, {"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}."""


class Message(TypedDict):
    """One turn. What a raw file left out is empty here, which `fault_in` names; other keys are there only where the raw row has them."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """What an assistant thinks before it answers."""
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    """Of a tool's turn: the call whose result it holds."""
    name: NotRequired[str]
    """Of a tool's turn: the tool."""
    learn: NotRequired[bool]
    """false: an answer that is shown and not learned."""


class Conversation(NamedTuple):
    """One line of data/prepared/*.jsonl."""

    id: str
    category: str
    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    """That the assistant may call."""
    source: str | None = None
    """File that it is from, where data.weights tells files apart."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Conversation":
        return cls(record["id"], record["category"], record["messages"], record.get("tools", ()), record.get("source"))

    def assistant_turns(self) -> Iterator[int]:
        """Positions in `messages` of the answers that a model learns, and is measured by."""
        return (index for index, message in enumerate(self.messages) if message["role"] == "assistant" and message.get("learn", True))


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations that prepare wrote.

    Raises:
        InputError: the file was changed since.
        FileNotFoundError: there is none.
    """
    path.stat()
    with translate_errors("prepared-unreadable", path, "holds no conversations as prepare writes them", "`dvc repro prepare`"):
        conversations = [Conversation.from_record(record) for record in read_jsonl(path)]
        for conversation in conversations:
            _ = conversation.id + conversation.category, [message["role"] + message["content"] for message in conversation.messages]
        return conversations


def with_system_message(messages: list[Message], content: str | None) -> list[Message]:
    """The same messages, opened by this system turn where they have none."""
    if content is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": content}, *messages]


def invalid_reason(messages: Sequence[Message]) -> str | None:
    """Why a conversation can't be trained on, in a word that is counted; None when it can.

    A system turn only first, then user and assistant in turn, results of tools after the calls, the last word the assistant's, nothing empty but
    the text beside a call and a tool's result, and an answer to learn.
    """
    reason = fault_in(roles_of(messages), [message["content"] for message in messages])
    if reason is None and not any(message["role"] == "assistant" and message.get("learn", True) for message in messages):
        return "nothing_to_learn"
    return reason


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The roles, CALL for an assistant that calls tools."""
    return tuple([CALL if "tool_calls" in message else message["role"] for message in messages])


def fault_in(roles: tuple[str, ...], contents: Sequence[str]) -> str | None:
    """Like `invalid_reason`, of `roles_of` the messages and their texts; whether an answer is learned is not looked at."""
    reason = _fault_in_order(roles)
    if reason is None and not all(map(str.strip, contents)):
        empty = {role for role, content in zip(roles, contents, strict=True) if not content.strip()}
        return "empty_content" if empty - {CALL, "tool"} else None
    return reason


@lru_cache
def _fault_in_order(roles: tuple[str, ...]) -> str | None:
    """A dataset holds few orders of roles: each is judged once."""
    if not roles:
        return "no_messages"
    if not ROLES.issuperset({*roles} - {CALL}):
        return "unknown_role"
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return "system_not_first"
    after = {"": ("user",), "user": ("assistant", CALL), "assistant": ("user",), CALL: ("tool",), "tool": ("tool", "assistant", CALL)}
    if any(role not in after[before] for before, role in zip(("", *turns), turns, strict=False)):
        return "roles_do_not_alternate"
    if not turns or turns[-1] not in ("assistant", CALL):
        return "no_final_answer"
    return None
