"""What the formats share: lists of turns, and what is no text."""

from typing import Any, Literal

from qlora.core.conversation import Message

TOOL_ROLES = frozenset(("tool", "function", "ipython", "observation", "function_call", "function_response", "tool_call", "tool_response"))
TOOL_KEYS = ("tool_calls", "function_call")


class UnsupportedTurnError(ValueError):
    """A row that is well formed and that this pipeline can't train on; `reason` is the word it is counted by."""

    def __init__(self, reason: Literal["tool_turn", "image"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


def message_list(column: str, found: Any, *, images: Any = None) -> list[Message]:
    """Messages from [{"role": ..., "content": ...}, ...]; `content` is text, or a list of parts {"type": "text", "text": ...}.

    Raises:
        ValueError: another type.
        UnsupportedTurnError: a tool turn, or a part that is no text.
    """
    if images:
        raise UnsupportedTurnError("image", "the row has images, which a text model can't see")
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"{column} is {found!r}, expected a list of {{'role': ..., 'content': ...}}")
    messages: list[Message] = []
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"{column}[{index}] is {item!r}, expected {{'role': ..., 'content': ...}}")
        role, content = item.get("role"), item.get("content")
        if not (isinstance(role, str) and isinstance(content, str)) or role in TOOL_ROLES or len(item) > 2:
            role, content = _unusual(f"{column}[{index}]", item)
        messages.append({"role": role, "content": content})
    return messages


def _unusual(place: str, item: dict[str, Any]) -> tuple[str, str]:
    """Role and text of a message that is more, or less, than two texts."""
    if "role" not in item and "content" not in item:
        raise ValueError(f"{place} has {', '.join(map(repr, item)) or 'nothing'}, expected 'role' and 'content'")
    role = text(f"{place}.role", item.get("role"))
    refuse_tools(place, role, item)
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_part(f"{place}.content[{index}]", part) for index, part in enumerate(content))
    return role, text(f"{place}.content", content)


def refuse_tools(place: str, role: str, item: dict[str, Any]) -> None:
    if role.lower() in TOOL_ROLES:
        raise UnsupportedTurnError("tool_turn", f"{place} is a tool turn ({role!r})")
    called = next((key for key in TOOL_KEYS if item.get(key)), None)
    if called:
        raise UnsupportedTurnError("tool_turn", f"{place} calls tools ({called!r})")


def _part(place: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        return text(f"{place}.text", part.get("text"))
    if isinstance(kind, str):
        raise UnsupportedTurnError("image", f"{place} is of type {kind!r}, which is no text")
    raise ValueError(f"{place} is {part!r}, expected {{'type': 'text', 'text': ...}}")


def text(place: str, value: Any) -> str:
    """The value, "" for null; raises ValueError for anything but text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{place} is {value!r} ({type(value).__name__}), expected text")
    return value or ""
