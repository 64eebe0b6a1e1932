"""Raw rows as lines of data/prepared: each checked by itself, put into a split by its prompt, and counted."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from qlora.core.conversation import Message, fault_in, with_system_message
from qlora.core.errors import InputError
from qlora.data import near_duplicates, readers
from qlora.data.duplicates import keys_of, normalised
from qlora.data.formats import FORMATS, recognised
from qlora.data.formats.turns import UnsupportedTurnError
from qlora.data.splits import split_of
from qlora.data.workers import Engine
from qlora.params.data import DataParams

CATEGORY_CHARS = 200


def numbers() -> "array[int]":
    return array("Q")


@dataclass(slots=True)
class Part:
    """What a few rows of one raw file give to one split. The arrays hold one number per line."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that are no line, by reason."""
    lines: bytearray = field(default_factory=bytearray)
    """The split's file."""
    ends: "array[int]" = field(default_factory=numbers)
    """Where each line ends in `lines`."""
    rows: "array[int]" = field(default_factory=numbers)
    """Number of the row in its file, from 1."""
    turns: "array[int]" = field(default_factory=numbers)
    """Answers."""
    characters: "array[int]" = field(default_factory=numbers)
    texts: "array[int]" = field(default_factory=numbers)
    """Key of the conversation."""
    prompts: "array[int]" = field(default_factory=numbers)
    """Key of what its last answer answers."""
    bands: list[bytes] = field(default_factory=list)
    """Keys by which near duplicates of the line are found, when they are looked for; nothing where it is too short."""

    def drop(self, positions: Sequence[int], reason: str) -> None:
        """Take these lines out and count them."""
        if not positions:
            return
        self.dropped[reason] += len(positions)
        gone = set(positions)
        kept = [position for position in range(len(self.ends)) if position not in gone]
        spans = list(pairwise((0, *self.ends)))
        lines = [self.lines[start:end] for start, end in (spans[position] for position in kept)]
        self.lines = bytearray().join(lines)
        self.ends = numbers()
        end = 0
        for line in lines:
            end += len(line)
            self.ends.append(end)
        for name in ("rows", "turns", "characters", "texts", "prompts"):
            values = getattr(self, name)
            setattr(self, name, array("Q", [values[position] for position in kept]))
        self.bands = [self.bands[position] for position in kept] if self.bands else []


class Cleaned(NamedTuple):
    path: Path
    parts: dict[str, Part]


class SplitCount:
    """What became of the rows of one split."""

    def __init__(self) -> None:
        self.rows_in = 0
        self.rows_out = 0
        self.turns = 0
        self.characters = 0
        self.longest = 0
        self.dropped: Counter[str] = Counter()

    def add(self, part: Part) -> None:
        self.rows_in += part.rows_in
        self.rows_out += len(part.ends)
        self.turns += sum(part.turns)
        self.characters += sum(part.characters)
        self.longest = max(self.longest, *part.characters, 0)
        self.dropped.update(part.dropped)

    def outcomes(self, split: str) -> list[dict[str, Any]]:
        """What became of the rows, to be drawn."""
        dropped = [{"outcome": f"{split}, dropped: {reason}", "rows": count} for reason, count in self.dropped.items()]
        return [{"outcome": split, "rows": self.rows_out}, *dropped]

    def record(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(self.dropped),
            "assistant_turns": self.turns,
            "characters": {"total": self.characters, "max": self.longest, "mean": round(self.characters / max(self.rows_out, 1), 3)},
        }


def clean(path: Path, data: DataParams, *, is_test: bool, engine: Engine) -> Iterator[Cleaned]:
    """The rows of a raw file or folder by split, a batch at a time, in order, whatever the engine.

    Raises:
        InputError: a file can't be read, a row is not of data.format, or data.on_invalid refuses it.
    """
    # A json array has to be read whole, by each process.
    divisible = all(file.suffix != ".json" for file in readers.files_of(path))
    return engine(partial(_clean_share, path, data, is_test), divisible=divisible)


def _clean_share(path: Path, data: DataParams, is_test: bool, share: int, shares: int) -> Iterator[Cleaned]:
    """Every shares-th batch; the others are read, which is cheap, and not looked at."""
    known = FORMATS[data.format]
    cleaner = _Cleaner(data, is_test=is_test)
    try:
        for index, batch in enumerate(readers.read_batches(path, known.columns, optional=(*known.optional, "category"))):
            if index % shares == share:
                yield Cleaned(batch.path, cleaner.parts_of(batch))
    except readers.MissingColumnError as error:
        raise InputError(error.code, error.message + _looks_like(recognised(error.found))) from None


class _Cleaner:
    """Makes lines of rows. What every row asks for is looked up, and rendered, once."""

    def __init__(self, data: DataParams, *, is_test: bool) -> None:
        self._to_messages = FORMATS[data.format].to_messages
        self._is_test = is_test
        self._validation, self._test = data.validation_fraction, data.carved_fraction
        self._drops_invalid = data.on_invalid == "drop"
        self._max_chars = data.max_chars
        self._near_threshold = data.near_threshold
        opening = with_system_message([], data.system_message)
        self._opening = b"".join(orjson.dumps(message) + b"," for message in opening)
        """The system turn for conversations without one, as it stands in a line."""
        self._opening_chars = sum(len(message["content"]) for message in opening)

    def parts_of(self, batch: readers.Batch) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        pairs: dict[str, list[list[bytes]]] = {}
        for number, row in enumerate(batch.rows(), start=batch.first):
            self._add(batch.path, number, row, parts, pairs)
        for split, conversations in pairs.items():
            parts[split].bands = near_duplicates.bands_of(conversations, self._near_threshold or 1)
        return parts

    def _add(self, path: Path, number: int, row: readers.Row, parts: dict[str, Part], pairs: dict[str, list[list[bytes]]]) -> None:
        """Add the row to the part of its split, as a line or as the reason why it can't be trained on, and its word pairs when they are asked for."""
        messages: list[Message] = []
        reason: str | None = None
        detail = ""
        try:
            messages = self._to_messages(row) if row else []
        except UnsupportedTurnError as error:
            reason, detail = error.reason, f" ({error})"
        except ValueError as error:
            raise InputError("data-types", f"{path}: row {number}: {error}. Fix the row or choose the data.format that fits") from None
        contents = [message["content"] for message in messages]
        characters = sum(map(len, contents))
        if not row or characters > self._max_chars:
            # Not looked at any further: its key is that of no text.
            messages, contents, reason, detail = [], [], "too_many_chars", f" (more than data.max_chars = {self._max_chars:,})"
        roles = tuple([message["role"] for message in messages])
        reason = reason or fault_in(roles, contents)
        texts = [normalised(content) for content in contents]
        text, prompt = keys_of(roles, texts)
        # A row without a text has no prompt to go by: it counts for train.
        split = "test" if self._is_test else split_of(prompt, validation=self._validation, test=self._test) if messages else "train"
        part = parts.get(split) or parts.setdefault(split, Part())
        part.rows_in += 1
        if reason is None:
            opens = roles[0] != "system"
            self._add_line(part, messages, row.get("category"), opens=opens)
            part.rows.append(number)
            # Turns alternate and the last is the assistant's: every second one is an answer.
            part.turns.append(len(messages) // 2)
            part.characters.append(characters + opens * self._opening_chars)
            part.texts.append(text)
            part.prompts.append(prompt)
            if self._near_threshold is not None:
                pairs.setdefault(split, []).append(near_duplicates.word_pairs(texts if opens else texts[1:]))
        elif self._drops_invalid:
            part.dropped[reason] += 1
        else:
            raise InputError("data-invalid", f"{path}: row {number}: {reason}{detail}, roles {[*roles]}. Fix the row or set data.on_invalid to drop")

    def _add_line(self, part: Part, messages: list[Message], category: object, *, opens: bool) -> None:
        """`{"id": ..., "category": ..., "messages": [...]}`: the messages, whose hash is the id, are rendered once."""
        rendered = orjson.dumps(messages)
        part.lines += b'{"id":"'
        part.lines += hashlib.sha256(rendered).hexdigest()[:16].encode()
        part.lines += b'","category":'
        part.lines += orjson.dumps("all" if category is None else str(category)[:CATEGORY_CHARS])
        part.lines += b',"messages":['
        if opens:
            part.lines += self._opening
        part.lines += rendered[1:]
        part.lines += b"}\n"
        part.ends.append(len(part.lines))


def _looks_like(names: list[str]) -> str:
    return f"; this looks like data.format: {' or '.join(names)}" if names else ""
