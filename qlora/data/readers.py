"""Raw data files as a stream of rows, told by their content: parquet, arrow, csv and JSON lines in bounded memory, a JSON array as a whole."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qlora.core.errors import InputError, MachineError
from qlora.core.text import in_shell, nfc

Row = dict[str, Any]
BATCH_ROWS = 1024
BATCH_BYTES = 64 << 20
"""A batch of more than this is made into Python objects row by row, and a batch of lines ends there."""
DICTIONARY_BYTES = 64 << 20
LINE_BYTES = 256 << 20
"""A longer line is not read to its end."""
NAMES_SHOWN = 20
LFS_POINTER = b"version https://git-lfs"
BOM = b"\xef\xbb\xbf"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
PACKABLE = (".json", ".jsonl", ".csv", ".tsv")
"""Parquet and arrow files are compressed within."""
METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "config.json", "package.json"))
"""Files beside the data that hold no rows."""
HARMLESS = frozenset(
    (
        *("id", "idx", "index", "row_id", "uuid", "prompt_id", "conversation_id", "hash", "conversation_hash", "__index_level_0__"),
        *("source", "dataset", "dataset_name", "origin", "split", "subset", "task", "topic", "domain", "tags", "title", "url", "license"),
        *("created", "created_at", "timestamp", "date", "language", "lang", "model", "meta", "metadata", "prompt", "num_turns", "turns", "turn"),
    )
)
"""Columns that say nothing of what is to be learned."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns that are read, under the names that the reader's caller knows, each with the names that a file may have for it."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]

    def found_in(self, names: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
        """(Name here, names there) of those that are there, and what is there besides and may change what a row means.

        Of several names for one column the first that holds something is read.

        Raises:
            LookupError: a required one is not there; its arguments are the name here and the usual one there.
        """
        there = set(names)
        pairs = []
        for own, spellings in (*self.required.items(), *self.optional.items()):
            if found := [name for name in spellings if name in there]:
                pairs.append((own, found))
            elif own in self.required:
                raise LookupError(own, spellings[0])
        read = {name for _, found in pairs for name in found}
        return pairs, [name for name in names if name not in read and name not in HARMLESS]


class BadRow(NamedTuple):
    """A row that is none."""

    reason: str
    """The word that it is counted by."""
    message: str


class Rows(NamedTuple):
    """The rows of a batch as Python objects."""

    rows: list[Row | BadRow]
    """One that is too large to be made is empty."""
    foreign: Counter[str]
    """Rows with a column that is neither read nor known to be harmless."""


class Batch(NamedTuple):
    """Up to BATCH_ROWS rows of one file, read but not yet made into Python objects."""

    path: Path
    first: int
    """Number of the first row in its file, from 1."""
    rows: Callable[[], Rows]


class MissingColumnError(InputError):
    """A file without a column that the format needs."""

    def __init__(self, place: str, own: str, name: str, found: Sequence[str]) -> None:
        super().__init__(
            "data-columns",
            f"{place} has no column {name!r}, only {_some(found)}: choose the data.format that fits, or name the column with "
            f"data.columns: {{{own}: COLUMN}}",
        )
        self.place, self.own, self.name, self.found = place, own, name, list(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingColumnError, (self.place, self.own, self.name, self.found)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(name[:100] for name in names[:NAMES_SHOWN]) + more


def files_of(path: Path) -> list[Path]:
    """The file itself, or all data files of a folder and its subfolders, sorted by name; other files are left alone, and hidden ones.

    Raises:
        InputError: there is no such file, or none in the folder.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_data(file) and file.is_file() and not _is_hidden(file.relative_to(path)))
        if not files:
            raise InputError("data-missing", f"{path} holds no file that ends in one of {', '.join(READERS)}")
        return files
    if not path.is_file():
        raise InputError("data-missing", f"{path} is neither a file nor a folder: {_way_to_existing(path)}")
    if kind_of(path) not in READERS:
        raise InputError("data-suffix", f"{path} ends in {path.suffix!r}: expected {', '.join(READERS)}, or {', '.join(PACKABLE)} with .gz or .zst")
    return [path]


def _way_to_existing(path: Path) -> str:
    """A name that was typed and one that came from another system may be spelled otherwise and look the same."""
    alike = [found for found in path.parent.glob("*") if nfc(found.name) == nfc(path.name)]
    if alike:
        return f"a file whose name looks the same is there, spelled with other characters: `mv {in_shell(alike[0])} {in_shell(path)}`"
    return "set data.train_file and data.test_file to existing ones"


def kind_of(path: Path) -> str:
    """The suffix by which a file is read, without that of its compression."""
    inner = path.with_suffix("").suffix
    return inner if path.suffix in COMPRESSED and inner in PACKABLE else path.suffix


def _is_data(file: Path) -> bool:
    return kind_of(file) in READERS and file.name not in METADATA


def _is_hidden(file: Path) -> bool:
    """Whether other programs keep it for themselves: .ipynb_checkpoints/, _temporary/."""
    return any(part.startswith((".", "_")) for part in file.parts)


def is_array(path: Path) -> bool:
    """Whether the file is one JSON array, which has to be read whole."""
    if kind_of(path) not in (".json", ".jsonl"):
        return False
    with _opened(path) as file:
        return file.read(1024).removeprefix(BOM).lstrip()[:1] == b"["


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    packed: Any = pa.CompressedInputStream(pa.OSFile(str(path)), COMPRESSED[path.suffix])
    return io.BufferedReader(packed, 1 << 20)


def read_batches(path: Path, columns: Columns) -> Iterator[Batch]:
    """The rows of a file, or of a folder of them, in order.

    Raises:
        InputError: a file is missing, empty, a Git-LFS pointer, damaged, or lacks a column.
    """
    for file in files_of(path):
        with file.open("rb") as opened:
            head = opened.read(len(LFS_POINTER))
        if not head:
            raise InputError("data-empty", f"{file} is empty (0 bytes): fetch it again")
        if head == LFS_POINTER:
            raise InputError("data-lfs-pointer", f"{file} is a Git-LFS pointer, not data: run `git lfs pull` or download the file itself")
        yield from READERS[kind_of(file)](file, columns)


def _parquet(path: Path, columns: Columns) -> Iterator[Batch]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, read_dictionary=_dictionaries(path)) as file:
            pairs, foreign = _found(path, columns, file.schema_arrow.names)
            read = {name for _, found in pairs for name in found}
            wanted = [name for name in file.schema_arrow.names if name in read]
            first = 1
            # A row group at a time: a dictionary ends with it.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    yield Batch(path, first, partial(_table_rows, path, batch, pairs, foreign))
                    first += batch.num_rows
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


UNREADABLE = (pa.ArrowException, MemoryError, OSError, ValueError, OverflowError, LookupError, TypeError)
"""What pyarrow raises for a damaged file."""


def _arrow(path: Path) -> Iterator[Batch]:
    """What `datasets.save_to_disk` writes: a stream, or a file, of record batches."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader: Any = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                reader = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            yield from reader
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _arrow_batches(path: Path, columns: Columns) -> Iterator[Batch]:
    return _tables(path, columns, _arrow(path))


def _csv_batches(path: Path, columns: Columns) -> Iterator[Batch]:
    """Every value is text."""
    from pyarrow import csv  # noqa: PLC0415 - which few files need

    skipped: list[str] = []

    def skip(row: Any) -> str:
        skipped.append(f"{path}: a line has {row.actual_columns} columns, the first line {row.expected_columns}: {str(row.text)[:100]!r}")
        return "skip"

    parse = csv.ParseOptions(delimiter="\t" if kind_of(path) == ".tsv" else ",", newlines_in_values=True, invalid_row_handler=skip)
    read = csv.ReadOptions(use_threads=False)
    first = 1
    try:
        with _opened(path) as file:
            names = csv.open_csv(file, read_options=read, parse_options=parse).schema.names
        skipped.clear()
        pairs, foreign = _found(path, columns, names)
        with _opened(path) as file:
            # As bytes: one that is no text costs its row, not the file.
            convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False)
            for whole in csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
                for start in range(0, whole.num_rows, BATCH_ROWS):
                    part = whole.slice(start, BATCH_ROWS)
                    yield Batch(path, first, partial(_text_rows, path, part, pairs, foreign))
                    first += part.num_rows
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if skipped:
        yield Batch(path, first, lambda: Rows([BadRow("wrong_columns", message) for message in skipped], Counter()))


def _text_rows(path: Path, batch: pa.RecordBatch, pairs: Sequence[tuple[str, list[str]]], foreign: Sequence[str]) -> Rows:
    rows, counts = _table_rows(path, batch, pairs, foreign)
    return Rows([_decoded(path, row) if isinstance(row, dict) else row for row in rows], counts)


def _decoded(path: Path, row: Row) -> Row | BadRow:
    try:
        return {name: value.decode() for name, value in row.items()}
    except UnicodeDecodeError as error:
        return BadRow("not_text", f"{path} holds a line that is not UTF-8 ({error})")


def _tables(path: Path, columns: Columns, batches: Iterator[pa.RecordBatch]) -> Iterator[Batch]:
    first = 1
    for whole in batches:
        pairs, foreign = _found(path, columns, whole.schema.names)
        read = whole.select(list(dict.fromkeys(name for _, found in pairs for name in found)))
        for start in range(0, read.num_rows, BATCH_ROWS):
            part = read.slice(start, BATCH_ROWS)
            yield Batch(path, first, partial(_table_rows, path, part, pairs, foreign))
            first += part.num_rows


def _dictionaries(path: Path) -> list[str]:
    """Text columns that are read as dictionaries: all of a small file.

    A text that stands there once and is named ten thousand times stays one text. In a large file texts are seldom repeated, and looking for
    repetitions would cost time and memory.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:
        if sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)) > DICTIONARY_BYTES:
            return []
        # From the schema: a damaged description of a column chunk would end the process in pyarrow's own code.
        columns = [file.schema.column(number) for number in range(len(file.schema))]
        return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _table_rows(path: Path, batch: pa.RecordBatch, pairs: Sequence[tuple[str, list[str]]], foreign: Sequence[str]) -> Rows:
    try:
        return Rows(_rows_of(batch, pairs), Counter(dict.fromkeys(foreign, batch.num_rows)))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _rows_of(batch: pa.RecordBatch, pairs: Sequence[tuple[str, list[str]]]) -> list[Row | BadRow]:
    if batch.nbytes > BATCH_BYTES and batch.num_rows > 1:
        return [row for place in range(batch.num_rows) for row in _rows_of(batch.slice(place, 1), pairs)]
    if batch.nbytes > BATCH_BYTES:
        # One row of so many bytes: a few of the file's may stand for it, repeated. No conversation is as long.
        return [{}]
    names = [own for own, _ in pairs]
    columns = [_first_filled([to_python(batch.column(name)) for name in found]) for _, found in pairs]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _first_filled(columns: list[list[Any]]) -> list[Any]:
    """Of each row the first value that holds something."""
    return columns[0] if len(columns) == 1 else [next(filter(None, values), values[0]) for values in zip(*columns, strict=True)]


def _unreadable(path: Path, error: Exception) -> InputError | MachineError:
    # pyarrow's error of memory is one of its own too.
    if isinstance(error, MemoryError):
        return MachineError("out-of-memory", f"{path} expands beyond this machine's memory ({error}): is it what it says to be?")
    return InputError("data-damaged", f"{path} can't be read ({error}): it is damaged or cut off, fetch it again")


def to_python(array: pa.Array) -> list[Any]:
    """The array's values, like array.to_pylist() and several times as fast for lists of structs.

    Flat columns become Python objects at once, and lists and dicts are made of those; pyarrow makes one scalar per value.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [to_python(column) for column in array.flatten()]
        # One dict per message of the dataset: `strict` would cost a tenth of the reading.
        values: list[Any] = [dict(zip(names, row)) for row in zip(*columns)] if names else [{} for _ in range(len(array))]  # noqa: B905
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_pylist()
        items = to_python(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        values = [items[start - offsets[0] : end - offsets[0]] for start, end in pairwise(offsets)]
    elif isinstance(kind, pa.BaseExtensionType):
        values = to_python(array.storage)
        # How `datasets` stores a column that holds now a text, now a list of parts.
        return [None if value is None else orjson.loads(value) for value in values] if kind.extension_name == "arrow.json" else values
    elif pa.types.is_dictionary(kind):
        texts = array.dictionary.to_pylist()
        return [None if index is None else texts[index] for index in array.indices.to_pylist()]
    else:
        return list(array.to_pylist())
    if array.null_count:
        values = [value if there else None for value, there in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _json(path: Path, columns: Columns) -> Iterator[Batch]:
    """A JSON array, or one object a line, whatever the file is called."""
    try:
        yield from (_array if is_array(path) else _lines)(path, columns)
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(path: Path, columns: Columns) -> Iterator[Batch]:
    first = 1
    lines: list[tuple[str, bytes]] = []
    size = number = 0
    with _opened(path) as file:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise InputError("data-damaged", f"{path}:{number} is longer than {LINE_BYTES:,} bytes: is it one JSON object a line?")
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                lines.append((f"{path}:{number}", line))
                size += len(line)
            if len(lines) == BATCH_ROWS or size > BATCH_BYTES:
                yield Batch(path, first, partial(_parsed_rows, lines, columns, opens=first == 1))
                first += len(lines)
                lines, size = [], 0
    if lines:
        yield Batch(path, first, partial(_parsed_rows, lines, columns, opens=first == 1))


def _parsed_rows(lines: list[tuple[str, bytes]], columns: Columns, *, opens: bool) -> Rows:
    made = Rows([], Counter())
    for number, (place, line) in enumerate(lines):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            made.rows.append(BadRow("not_json", f"{place} is not JSON ({error}): fix or fetch it again"))
            continue
        _add(made, place, row, columns, opens=opens and number == 0)
    return made


def _array(path: Path, columns: Columns) -> Iterator[Batch]:
    with _opened(path) as file:
        text = file.read().removeprefix(BOM)
    try:
        rows = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        rows = _with_surrogates(text)
        if rows is None:
            raise InputError("data-damaged", f"{path} is not JSON ({error}): fix or fetch it again") from None
    for start in range(0, len(rows), BATCH_ROWS):
        yield Batch(path, start + 1, partial(_array_rows, path, rows, start, columns))


def _with_surrogates(text: bytes) -> list[Any] | None:
    """An array in which a row holds half a surrogate pair, with text in that row's place; None for what is no array."""
    try:
        rows = json.loads(text)
        return [row if _is_text(row) else "a row with half a surrogate pair" for row in rows]
    except (ValueError, RecursionError):
        return None


def _is_text(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def _array_rows(path: Path, rows: list[Any], start: int, columns: Columns) -> Rows:
    made = Rows([], Counter())
    for number, row in enumerate(rows[start : start + BATCH_ROWS], start=start + 1):
        _add(made, f"{path}: row {number}", row, columns, opens=number == 1)
    return made


READERS: dict[str, Callable[[Path, Columns], Iterator[Batch]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _json,
    ".arrow": _arrow_batches,
    ".csv": _csv_batches,
    ".tsv": _csv_batches,
}


def _add(made: Rows, place: str, row: Any, columns: Columns, *, opens: bool) -> None:
    """The row under the names that are known here, or why it is none.

    Args:
        opens: It is the first of its file: without a column that the format needs, the format is another.
    """
    if not isinstance(row, dict):
        made.rows.append(BadRow("no_object", f"{place} holds {type(row).__name__}, expected an object"))
        return
    pairs, foreign, missing = _known(tuple(row), columns)
    if missing and opens:
        raise MissingColumnError(place, *missing, list(row))
    if missing:
        made.rows.append(BadRow("missing_column", f"{place} has no column {missing[1]!r}, only {_some(list(row))}"))
        return
    made.rows.append({own: row[found[0]] if len(found) == 1 else next(filter(None, map(row.get, found)), row[found[0]]) for own, found in pairs})
    if foreign:
        made.foreign.update(name for name in foreign if row[name] is not None)


@lru_cache(maxsize=1024)
def _known(names: tuple[str, ...], columns: Columns) -> tuple[list[tuple[str, list[str]]], list[str], tuple[str, str] | None]:
    """What of these names is read and what is foreign; the name of a column that is missing. Most files hold few sets of names."""
    try:
        return *columns.found_in(names), None
    except LookupError as error:
        own, name = error.args
        return [], [], (str(own), str(name))


def _found(path: Path, columns: Columns, names: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    try:
        return columns.found_in(names)
    except LookupError as error:
        own, name = error.args
        raise MissingColumnError(str(path), own, name, names) from None
