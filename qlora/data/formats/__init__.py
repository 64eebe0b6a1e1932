"""How a raw row holds its conversation: one file per format, one line per format in FORMATS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats import alpaca, messages, prompt_completion, sharegpt


@dataclass(frozen=True, slots=True)
class Format:
    """A format is a function from a row to its messages, and the columns that it reads."""

    columns: tuple[str, ...]
    """Columns that a file of this format must have."""
    optional: tuple[str, ...]
    """Columns that are read where they are there."""
    to_messages: Callable[[dict[str, Any]], list[Message]]
    """Raises ValueError, naming what is wrong, for a row that is not of this format; UnsupportedTurnError for one that is and can't be used."""


FORMATS: dict[str, Format] = {
    "messages": Format(messages.COLUMNS, messages.OPTIONAL, messages.to_messages),
    "sharegpt": Format(sharegpt.COLUMNS, sharegpt.OPTIONAL, sharegpt.to_messages),
    "alpaca": Format(alpaca.COLUMNS, alpaca.OPTIONAL, alpaca.to_messages),
    "prompt_completion": Format(prompt_completion.COLUMNS, prompt_completion.OPTIONAL, prompt_completion.to_messages),
}


def recognised(columns: Sequence[str]) -> list[str]:
    """Names of the formats that a file with these columns may be of."""
    return [name for name, known in FORMATS.items() if set(known.columns) <= set(columns)]
