"""The one Conversation that every input format becomes and every later step reads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

ROLES = frozenset(("system", "user", "assistant"))


class Message(TypedDict):
    """One turn. What a raw file left out is empty here, which `invalid_reason` names."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of data/prepared/*.jsonl."""

    id: str
    category: str
    messages: Sequence[Message]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Conversation":
        return cls(record["id"], record["category"], record["messages"])

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "category": self.category, "messages": list(self.messages)}

    def with_system_message(self, content: str | None) -> "Conversation":
        """The same conversation, opened by this system turn where it has none."""
        if content is None or (self.messages and self.messages[0]["role"] == "system"):
            return self
        return Conversation(self.id, self.category, [{"role": "system", "content": content}, *self.messages])

    def assistant_turns(self) -> Iterator[int]:
        """Positions in `messages` of the turns that a model answers."""
        return (index for index, message in enumerate(self.messages) if message["role"] == "assistant")


def invalid_reason(messages: Sequence[Message]) -> str | None:
    """Why a conversation can't be trained on, in a word that is counted; None when it can.

    A system turn only first, then user and assistant in turn, the last word the assistant's, nothing empty.
    """
    if not messages:
        return "no_messages"
    roles = [message["role"] for message in messages]
    if not ROLES.issuperset(roles):
        return "unknown_role"
    if not all([message["content"].strip() for message in messages]):
        return "empty_content"
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return "system_not_first"
    if turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        return "roles_do_not_alternate"
    if not turns or turns[-1] != "assistant":
        return "no_final_answer"
    return None
