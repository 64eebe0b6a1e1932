"""The one Conversation that every input format becomes and every later step reads."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

ROLES = frozenset(("system", "user", "assistant"))


class Message(TypedDict):
    """One turn. What a raw file left out is empty here, which `invalid_reason` names."""

    role: str
    content: str


class Conversation(NamedTuple):
    """One line of data/prepared/*.jsonl."""

    id: str
    category: str
    messages: Sequence[Message]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Conversation":
        return cls(record["id"], record["category"], record["messages"])

    def assistant_turns(self) -> Iterator[int]:
        """Positions in `messages` of the turns that a model answers."""
        return (index for index, message in enumerate(self.messages) if message["role"] == "assistant")


def with_system_message(messages: list[Message], content: str | None) -> list[Message]:
    """The same messages, opened by this system turn where they have none."""
    if content is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": content}, *messages]


def invalid_reason(messages: Sequence[Message]) -> str | None:
    """Why a conversation can't be trained on, in a word that is counted; None when it can.

    A system turn only first, then user and assistant in turn, the last word the assistant's, nothing empty.
    """
    return fault_in(tuple([message["role"] for message in messages]), [message["content"] for message in messages])


def fault_in(roles: tuple[str, ...], contents: Sequence[str]) -> str | None:
    """Like `invalid_reason`."""
    reason = _fault_in_order(roles)
    if reason is None and not all(map(str.strip, contents)):
        return "empty_content"
    return reason


@lru_cache
def _fault_in_order(roles: tuple[str, ...]) -> str | None:
    """A dataset holds few orders of roles: each is judged once."""
    if not roles:
        return "no_messages"
    if not ROLES.issuperset(roles):
        return "unknown_role"
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return "system_not_first"
    if turns != (("user", "assistant") * len(turns))[: len(turns)]:
        return "roles_do_not_alternate"
    if not turns or turns[-1] != "assistant":
        return "no_final_answer"
    return None
