"""How a raw row holds its conversation: one file per format, one line per format in FORMATS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora.conversation import Message
from qlora.formats import messages


@dataclass(frozen=True, slots=True)
class Format:
    """A format is a function from a row to its messages, and the columns that it reads."""

    columns: tuple[str, ...]
    """Columns that a file of this format must have."""
    to_messages: Callable[[dict[str, Any]], list[Message]]
    """Raises ValueError, naming what is wrong, for a row that is not of this format."""


FORMATS: dict[str, Format] = {
    "messages": Format(messages.COLUMNS, messages.to_messages),
}
