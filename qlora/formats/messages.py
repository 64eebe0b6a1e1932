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
    messages: list[Message] = []
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"messages[{index}] is {item!r}, expected {{'role': ..., 'content': ...}}")
        role, content = item.get("role"), item.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            role, content = _text(index, "role", role), _text(index, "content", content)
        messages.append({"role": role, "content": content})
    return messages


def _text(index: int, key: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"messages[{index}].{key} is {value!r} ({type(value).__name__}), expected text")
    return value or ""
