"""Raw rows as lines of data/prepared: each checked by itself, put into a split by its content, and counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from qlora import raw_rows
from qlora.conversation import Message, invalid_reason, with_system_message
from qlora.errors import InputError
from qlora.formats import FORMATS
from qlora.parallel import interleaved
from qlora.params.data import DataParams
from qlora.records import json_line
from qlora.splits import content_hash, split_of


@dataclass(slots=True)
class SplitCount:
    """What became of the rows of one split."""

    rows_in: int = 0
    rows_out: int = 0
    turns: int = 0
    characters: int = 0
    longest: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, messages: Sequence[Message]) -> None:
        length = sum([len(message["content"]) for message in messages])
        self.rows_out += 1
        # Turns alternate and the last is the assistant's: after a system turn or none, every second one is an answer.
        self.turns += len(messages) // 2
        self.characters += length
        self.longest = max(self.longest, length)

    def add(self, other: "SplitCount") -> None:
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.turns += other.turns
        self.characters += other.characters
        self.longest = max(self.longest, other.longest)
        self.dropped.update(other.dropped)

    def record(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(self.dropped),
            "assistant_turns": self.turns,
            "characters": {"total": self.characters, "max": self.longest, "mean": round(self.characters / max(self.rows_out, 1), 3)},
        }


@dataclass(slots=True)
class Part:
    """What a few raw rows give to one split."""

    count: SplitCount = field(default_factory=SplitCount)
    lines: bytearray = field(default_factory=bytearray)
    """Lines of the split's file."""


Parts = dict[str, Part]


def clean_file(path: Path, data: DataParams, *, is_test: bool, processes: int) -> Iterator[Parts]:
    """The rows of a raw file by split, a batch at a time, in order, whatever the number of processes.

    Raises:
        InputError: the file can't be read, a row is not of data.format, or data.on_invalid refuses it.
    """
    # A json array has to be read whole, by each process.
    return interleaved(partial(_clean_share, path, data, is_test), 1 if path.suffix == ".json" else processes)


def _clean_share(path: Path, data: DataParams, is_test: bool, share: int, shares: int) -> Iterator[Parts]:
    columns = FORMATS[data.format].columns
    for first, rows in raw_rows.read_batches(path, columns, optional=("category",), share=share, shares=shares):
        parts: Parts = {}
        for number, row in enumerate(rows, start=first):
            _clean_row(path, number, row, data, is_test, parts)
        yield parts


def _clean_row(path: Path, number: int, row: raw_rows.Row, data: DataParams, is_test: bool, parts: Parts) -> None:
    """Add the row to the part of its split, as a line or as the reason why it can't be trained on."""
    try:
        messages = FORMATS[data.format].to_messages(row)
    except ValueError as error:
        raise InputError("data-types", f"{path}: row {number}: {error}. Mend the row or choose the data.format that fits") from None
    digest = content_hash(orjson.dumps(messages))
    split = "test" if is_test else split_of(digest, validation=data.validation_fraction, test=data.carved_fraction)
    part = parts.get(split) or parts.setdefault(split, Part())
    part.count.rows_in += 1
    reason = invalid_reason(messages)
    if reason is None:
        category = row.get("category")
        whole = with_system_message(messages, data.system_message)
        part.count.keep(whole)
        part.lines += json_line({"id": digest[:16], "category": "all" if category is None else str(category), "messages": whole})
    elif data.on_invalid == "drop":
        part.count.dropped[reason] += 1
    else:
        roles = [message["role"] for message in messages]
        raise InputError("data-invalid", f"{path}: row {number}: {reason}, roles {roles}. Mend the row or set data.on_invalid to drop")
