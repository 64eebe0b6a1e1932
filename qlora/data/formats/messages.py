"""Formats `messages` (no_robots, OpenAI) and `sharegpt` (Vicuna, OpenHermes): a list of turns in a column.

{"messages": [{"role": ..., "content": ...}, ...]} and {"conversations": [{"from": "human", "value": ...}, ...], "system": ...} differ by
their usual spelling alone: both are read under both formats.
"""

from collections import Counter
from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import message_list, text

COLUMNS = {"messages": ("messages", "conversations", "conversation")}
OPTIONAL = {"system": ("system", "system_prompt"), "images": ("images", "image")}


def to_messages(row: dict[str, Any], ignored: Counter[str] | None = None) -> list[Message]:
    """The row's turns, opened by its `system` where that holds text; null becomes no turns, which is then an invalid conversation.

    Raises:
        ValueError: the list or one of its items has another type or other keys.
        UnsupportedTurnError: an image, a weight or a call that can't be used.
    """
    messages = message_list("messages", row.get("messages"), images=row.get("images"), ignored=ignored)
    system = text("system", row.get("system"))
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages
