"""Format `messages` (no_robots, OpenAI): {"messages": [{"role": ..., "content": ...}, ...]}."""

from typing import Any

from qlora.conversation import Message

COLUMNS = ("messages",)


def to_messages(row: dict[str, Any]) -> list[Message]:
    """The row's messages with nothing but role and content; null becomes empty, which is then an invalid conversation.

    Raises:
        ValueError: `messages` or one of its items has another type.
    """
    found = row.get("messages")
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"messages is {found!r}, expected a list of {{'role': ..., 'content': ...}}")
    return [_message(index, item) for index, item in enumerate(found)]


def _message(index: int, item: Any) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"messages[{index}] is {item!r}, expected {{'role': ..., 'content': ...}}")
    role, content = item.get("role"), item.get("content")
    for key, value in (("role", role), ("content", content)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"messages[{index}].{key} is {value!r} ({type(value).__name__}), expected text")
    return {"role": role or "", "content": content or ""}
