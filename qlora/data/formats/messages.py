"""Format `messages` (no_robots, OpenAI): {"messages": [{"role": ..., "content": ...}, ...]}."""

from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import message_list

COLUMNS = ("messages",)
OPTIONAL = ("images",)


def to_messages(row: dict[str, Any]) -> list[Message]:
    """The row's messages with nothing but role and content; null becomes empty, which is then an invalid conversation.

    Raises:
        ValueError: `messages` or one of its items has another type.
        UnsupportedTurnError: a tool turn or an image.
    """
    return message_list("messages", row.get("messages"), images=row.get("images"))
