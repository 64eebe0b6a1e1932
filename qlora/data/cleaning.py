"""Raw rows as lines of data/prepared: each checked by itself, put into a split by its prompt, and counted."""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from qlora.core.conversation import PLAIN_KEYS, ROLES, Message, Tool, fault_in, roles_of, with_system_message
from qlora.core.errors import InputError
from qlora.data import near_duplicates, readers
from qlora.data.duplicates import keys_of, normalised, whole_text
from qlora.data.formats import FORMATS, OF_EVERY_FORMAT, recognised
from qlora.data.formats.turns import UnsupportedTurnError, tools_of
from qlora.data.splits import split_of
from qlora.data.workers import Engine
from qlora.params.data import DataParams

CATEGORY_CHARS = 200
EXAMPLES = 3
"""Rows of each reason that are named."""
DETAIL_CHARS = 150
NOT_DRAWN = "not_drawn"
"""Reason of a row that data.weights leaves out."""
WEIGHT_SEED = 1
NESTING = re.compile(rb"[\[\]{}]")
MOST_NESTED = 100
"""Brackets within brackets, those in texts counted too."""


def numbers() -> "array[int]":
    return array("Q")


@dataclass(slots=True)
class Part:
    """What a few rows of one raw file give to one split. The arrays hold one number per line."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that are no line, by reason."""
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Of each reason the first rows: their number, and what is wrong with them where the reason alone does not say it."""
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
    copies: "array[int]" = field(default_factory=numbers)
    """How often the line is written, where data.weights says so."""
    bands: list[bytes] = field(default_factory=list)
    """Keys by which near duplicates of the line are found, when they are looked for; nothing where it is too short."""

    def count_dropped(self, reason: str, number: int, detail: str = "") -> None:
        """A row of this number is no line."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append((number, detail))

    def drop(self, positions: Sequence[int], reason: str) -> None:
        """Take these lines out and count them."""
        if not positions:
            return
        for position in positions:
            self.count_dropped(reason, self.rows[position])
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
        for name in ("rows", "turns", "characters", "texts", "prompts", "copies"):
            if values := getattr(self, name):
                setattr(self, name, array("Q", [values[position] for position in kept]))
        self.bands = [self.bands[position] for position in kept] if self.bands else []

    def repeated(self) -> bytes:
        """Lines that are written again, after `lines`."""
        spans = pairwise((0, *self.ends))
        return b"".join(bytes(self.lines[start:end]) * (copies - 1) for (start, end), copies in zip(spans, self.copies, strict=bool(self.copies)))


class Cleaned(NamedTuple):
    path: Path
    parts: dict[str, Part]
    ignored: Counter[str]
    """Rows, and messages, with a column or key that is neither read nor known to be harmless."""


class FileCount:
    """What became of the rows of one file."""

    def __init__(self) -> None:
        self.rows_in = self.repeated = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[int, str]]] = {}

    def add(self, parts: Mapping[str, Part]) -> None:
        for part in parts.values():
            self.rows_in += part.rows_in
            self.repeated += sum(part.copies) - len(part.copies)
            self.dropped.update(part.dropped)
            for reason, rows in part.examples.items():
                self.examples[reason] = sorted([*self.examples.get(reason, ()), *rows])[:EXAMPLES]

    def record(self) -> dict[str, Any]:
        record = {"rows_in": self.rows_in, "rows_out": self.rows_in - self.dropped.total(), "dropped": dict(self.dropped)}
        return record | ({"repeated": self.repeated} if self.repeated else {})

    def told(self) -> str:
        """In a line: rows, and of each reason how many were dropped and which were the first."""
        kept = self.rows_in - self.dropped.total()
        reasons = [
            f"{count:,} {reason}: row {', '.join(f'{number}{detail}' for number, detail in self.examples[reason])}"
            for reason, count in self.dropped.most_common()
        ]
        again = f", {self.repeated:,} written again" if self.repeated else ""
        return f"{self.rows_in:,} rows, {kept:,} kept{again}" + (f", dropped {'; '.join(reasons)}" if reasons else "")


class SplitCount:
    """What became of the rows of one split."""

    def __init__(self) -> None:
        self.rows_in = 0
        self.rows_out = 0
        self.repeated = 0
        """Lines that are written once more."""
        self.turns = 0
        self.characters = 0
        self.longest = 0
        self.dropped: Counter[str] = Counter()

    def add(self, part: Part) -> None:
        self.rows_in += part.rows_in
        self.rows_out += len(part.ends)
        self.repeated += sum(part.copies) - len(part.copies)
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
            **({"repeated": self.repeated} if self.repeated else {}),
            "assistant_turns": self.turns,
            "characters": {"total": self.characters, "max": self.longest, "mean": round(self.characters / max(self.rows_out, 1), 3)},
        }


def clean(path: Path, data: DataParams, *, is_test: bool, engine: Engine) -> Iterator[Cleaned]:
    """The rows of a raw file or folder by split, a batch at a time, in order, whatever the engine.

    Raises:
        InputError: a file can't be read, a row is not of data.format, or data.on_invalid refuses it.
    """
    # A json array has to be read whole, by each process.
    divisible = not any(readers.is_array(file) for file in readers.files_of(path))
    return engine(partial(_clean_share, path, data, is_test), divisible=divisible)


def source_of(file: Path, root: Path) -> str:
    """The path of a file in the folder that is read, or the name of the one file."""
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def require_known_weights(data: DataParams) -> None:
    """Raises InputError for a name in data.weights that is not a file of data.train_file."""
    root = Path(data.train_file)
    known = [source_of(file, root) for file in readers.files_of(root)] if data.weights else []
    if unknown := [name for name in data.weights if name not in known]:
        raise InputError("data-weights", f"data.weights names {unknown[0]!r}, which is not a file of {root}: known are {', '.join(known[:20])}")


def columns_of(data: DataParams) -> readers.Columns:
    """What is read of a file, by the names that data.columns gives it.

    Raises:
        InputError: data.columns names what data.format does not read.
    """
    known = FORMATS[data.format]
    optional = {**known.optional, **OF_EVERY_FORMAT}
    if unknown := [name for name in data.columns if name not in {**known.columns, **optional}]:
        raise InputError(
            "data-columns",
            f"data.columns names {unknown[0]!r}, which data.format: {data.format} does not read; known: {', '.join({**known.columns, **optional})}",
        )
    renamed = {name: (column,) for name, column in data.columns.items()}
    return readers.Columns(
        {name: renamed.get(name, spellings) for name, spellings in known.columns.items()},
        {name: renamed.get(name, spellings) for name, spellings in optional.items()},
    )


def _clean_share(path: Path, data: DataParams, is_test: bool, share: int, shares: int) -> Iterator[Cleaned]:
    """Every shares-th batch; the others are read, which is cheap, and not looked at."""
    cleaner = _Cleaner(data, is_test=is_test)
    try:
        for index, batch in enumerate(readers.read_batches(path, columns_of(data))):
            if index % shares == share:
                yield cleaner.clean(batch)
    except readers.MissingColumnError as error:
        raise InputError(error.code, error.message + _looks_like(recognised(error.found))) from None


class _Cleaner:
    """Makes lines of rows. What every row asks for is looked up, and rendered, once."""

    def __init__(self, data: DataParams, *, is_test: bool) -> None:
        self._weights, self._root = data.weights, Path(data.test_file if is_test else data.train_file)
        self._to_messages = FORMATS[data.format].to_messages
        self._is_test = is_test
        self._validation, self._test = data.validation_fraction, data.carved_fraction
        self._drops_invalid = data.on_invalid == "drop"
        self._max_chars = data.max_chars
        self._near_threshold = data.near_threshold
        self._keys: Counter[str] = Counter()
        """Of messages, in one batch, that are neither read nor known to be harmless."""
        opening = with_system_message([], data.system_message)
        self._opening = b"".join(orjson.dumps(message) + b"," for message in opening)
        """The system turn for conversations without one, as it stands in a line."""
        self._opening_chars = sum(len(message["content"]) for message in opening)

    def clean(self, batch: readers.Batch) -> Cleaned:
        cleaned = Cleaned(batch.path, {}, Counter())
        self._keys.clear()
        pairs: dict[str, list[list[bytes]]] = {}
        rows, foreign = batch.rows()
        for number, row in enumerate(rows, start=batch.first):
            self._add(cleaned, number, row, pairs)
        cleaned.ignored.update({f"column {name!r}": count for name, count in foreign.items()})
        cleaned.ignored.update({f"key {key!r} of messages": count for key, count in self._keys.items()})
        for split, conversations in pairs.items():
            cleaned.parts[split].bands = near_duplicates.bands_of(conversations, self._near_threshold or 1)
        return cleaned

    def _add(self, cleaned: Cleaned, number: int, row: readers.Row | readers.BadRow, pairs: dict[str, list[list[bytes]]]) -> None:
        """Add the row to the part of its split, as a line or as the reason why it can't be trained on, and its word pairs when they are asked for."""
        messages, tools, reason, detail = self._read(row)
        contents = [message["content"] for message in messages]
        # Most rows: what they have is roles and texts.
        plain = not tools and max(map(len, messages), default=0) <= PLAIN_KEYS
        whole = contents if plain else [*map(whole_text, messages), *([orjson.dumps(tools).decode()] if tools else [])]
        characters = sum(map(len, whole))
        if reason is None and (not row or characters > self._max_chars):
            # Not looked at any further: its key is that of no text.
            messages, contents, whole, reason, detail = [], [], [], "too_many_chars", f"more than data.max_chars = {self._max_chars:,}"
        roles = tuple([message["role"] for message in messages]) if plain else roles_of(messages)
        reason = reason or fault_in(roles, contents)
        if reason is None and not plain and not any(map(_is_answer, messages)):
            reason = "nothing_to_learn"
        texts = [normalised(content) for content in whole]
        text, prompt = keys_of(roles, texts)
        # A row without a text has no prompt to go by: it counts for train.
        split = "test" if self._is_test else split_of(prompt, validation=self._validation, test=self._test) if messages else "train"
        part = cleaned.parts.get(split) or cleaned.parts.setdefault(split, Part())
        part.rows_in += 1
        copies = self._copies_of(cleaned.path, text) if self._weights and split == "train" and reason is None else 1
        if copies == 0:
            part.count_dropped(NOT_DRAWN, number)
        elif reason is None:
            assert isinstance(row, dict)
            opens = roles[0] != "system"
            self._add_line(part, messages, tools, row.get("category"), self._source_of(cleaned.path), opens=opens)
            if self._weights:
                part.copies.append(copies)
            part.rows.append(number)
            part.turns.append(roles.count("assistant") if plain else sum(_is_answer(message) for message in messages))
            part.characters.append(characters + opens * self._opening_chars)
            part.texts.append(text)
            part.prompts.append(prompt)
            if self._near_threshold is not None:
                pairs.setdefault(split, []).append(near_duplicates.word_pairs(texts[not opens : len(messages)]))
        elif self._drops_invalid:
            part.count_dropped(reason, number, f" ({_short(detail or _told(reason, roles))})" if detail or reason == "unknown_role" else "")
        else:
            told = f" ({detail})" if detail else ""
            raise InputError(
                "data-invalid", f"{cleaned.path}: row {number}: {reason}{told}, roles {[*roles]}. Fix the row or set data.on_invalid to drop"
            )

    def _copies_of(self, path: Path, text: int) -> int:
        """How often a conversation of this key is in the train split: the whole part of its file's weight, and once more by the hash of its text."""
        whole, share = divmod(self._weights.get(self._source_of(path), 1.0), 1)
        drawn = xxhash.xxh3_64_intdigest(text.to_bytes(8, "little"), seed=WEIGHT_SEED) / 2**64
        return int(whole) + (drawn < share)

    def _source_of(self, path: Path) -> str:
        """The file as data.weights names it; "" where it tells no files apart."""
        return source_of(path, self._root) if self._weights else ""

    def _read(self, row: readers.Row | readers.BadRow) -> tuple[list[Message], list[Tool], str | None, str]:
        """Messages and tools of the row; where it has none that can be used, the reason and what is wrong."""
        if isinstance(row, readers.BadRow):
            return [], [], row.reason, row.message
        if not row:
            return [], [], None, ""
        try:
            messages = self._to_messages(row, self._keys)
            tools = tools_of(row["tools"]) if row.get("tools") else []
            if tools or max(map(len, messages), default=0) > PLAIN_KEYS:
                _require_json([*messages, *tools])
            if not isinstance(row.get("category"), str):
                str(row.get("category"))
        except UnsupportedTurnError as error:
            return [], [], error.reason, str(error)
        except ValueError as error:
            return [], [], "wrong_type", str(error)
        except (TypeError, OverflowError) as error:
            # Of values that JSON has no form for, such as bytes in a parquet file's arguments.
            return [], [], "wrong_type", f"it can't be written as JSON: {error}"
        except RecursionError:
            return [], [], "wrong_type", "it is nested too deeply"
        return messages, tools, None, ""

    def _add_line(self, part: Part, messages: list[Message], tools: list[Tool], category: object, source: str, *, opens: bool) -> None:
        """`{"id": ..., "category": ..., "messages": [...]}`, with source and tools where there are any: the messages are rendered once."""
        rendered = orjson.dumps(messages)
        offered = b',"tools":' + orjson.dumps(tools) if tools else b""
        part.lines += b"".join(
            (
                b'{"id":"',
                hashlib.sha256(rendered + offered if offered else rendered).hexdigest()[:16].encode(),
                b'","category":',
                orjson.dumps("all" if category is None else str(category)[:CATEGORY_CHARS]),
                b',"source":' + orjson.dumps(source) if source else b"",
                b',"messages":[',
                self._opening if opens else b"",
                rendered[1:],
                offered,
                b"}\n",
            )
        )
        part.ends.append(len(part.lines))


def _require_json(values: Sequence[Any]) -> None:
    """Raises TypeError for what can't be written as JSON, and for what is nested so deeply that a chat template could not render it."""
    text = orjson.dumps(values)
    depth = most = 0
    for code in NESTING.findall(text):
        depth += 1 if code in (b"[", b"{") else -1
        most = max(most, depth)
    if most > MOST_NESTED:
        raise TypeError(f"it is nested more than {MOST_NESTED} deep")


def _is_answer(message: Message) -> bool:
    """Whether it is learned."""
    return message["role"] == "assistant" and message.get("learn", True)


def _told(reason: str, roles: Sequence[str]) -> str:
    """What the reason leaves open."""
    return ", ".join(repr(role) for role in roles if role not in ROLES) if reason == "unknown_role" else ""


def _short(detail: str) -> str:
    return detail if len(detail) <= DETAIL_CHARS else detail[: DETAIL_CHARS - 3] + "..."


def _looks_like(names: list[str]) -> str:
    return f"; this looks like data.format: {' or '.join(names)}" if names else ""
