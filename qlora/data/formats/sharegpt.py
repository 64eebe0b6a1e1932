"""Format `sharegpt` (Vicuna, OpenHermes): {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}."""

from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import UnsupportedTurnError, refuse_tools, text

COLUMNS = ("conversations",)
OPTIONAL = ("system", "images", "image")
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
IMAGE_MARK = "<image>"


def to_messages(row: dict[str, Any]) -> list[Message]:
    """The row's turns, opened by its `system` where that holds text; an unknown `from` stays, and is then an invalid role.

    Raises:
        ValueError: `conversations` or one of its items has another type or other keys.
        UnsupportedTurnError: a tool turn or an image.
    """
    if row.get("images") or row.get("image"):
        raise UnsupportedTurnError("image", "the row has images, which a text model can't see")
    found = row.get("conversations")
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"conversations is {found!r}, expected a list of {{'from': ..., 'value': ...}}")
    system = text("system", row.get("system"))
    opening: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    return opening + [_message(f"conversations[{index}]", item) for index, item in enumerate(found)]


def _message(place: str, item: Any) -> Message:
    if not isinstance(item, dict) or not ("from" in item or "value" in item):
        raise ValueError(f"{place} is {item!r}, expected {{'from': ..., 'value': ...}}")
    speaker, content = text(f"{place}.from", item.get("from")), text(f"{place}.value", item.get("value"))
    refuse_tools(place, speaker, item)
    if IMAGE_MARK in content:
        raise UnsupportedTurnError("image", f"{place}.value holds {IMAGE_MARK!r}")
    return {"role": ROLES.get(speaker.lower(), speaker), "content": content}
