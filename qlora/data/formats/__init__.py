"""How a raw row holds its conversation: one file per format, one line per format in FORMATS."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats import alpaca, messages, prompt_completion

Names = Mapping[str, tuple[str, ...]]
"""Columns under the names that a format reads, each with the names that it may have in a file, the usual one first."""
OF_EVERY_FORMAT: Names = {"tools": ("tools", "functions"), "category": ("category",)}


@dataclass(frozen=True, slots=True)
class Format:
    """A format is a function from a row to its messages, and the columns that it reads."""

    columns: Names
    """Columns that a file of this format must have."""
    optional: Names
    """Columns that are read where they are there."""
    to_messages: Callable[[dict[str, Any], Counter[str] | None], list[Message]]
    """Raises ValueError, naming what is wrong, for a row that is not of this format; UnsupportedTurnError for one that is and can't be used."""


FORMATS: dict[str, Format] = {
    "messages": Format(messages.COLUMNS, messages.OPTIONAL, messages.to_messages),
    "sharegpt": Format(messages.COLUMNS, messages.OPTIONAL, messages.to_messages),
    "alpaca": Format(alpaca.COLUMNS, alpaca.OPTIONAL, alpaca.to_messages),
    "prompt_completion": Format(prompt_completion.COLUMNS, prompt_completion.OPTIONAL, prompt_completion.to_messages),
}


def recognised(columns: Sequence[str]) -> list[str]:
    """Names of the formats that a file with these columns may be of."""
    return [name for name, known in FORMATS.items() if all(set(names) & set(columns) for names in known.columns.values())]
