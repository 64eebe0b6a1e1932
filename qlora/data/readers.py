"""Raw data files as a stream of rows: parquet and jsonl in bounded memory, a json array as a whole."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qlora.core.errors import InputError, MachineError

Row = dict[str, Any]
BATCH_ROWS = 1024
BATCH_BYTES = 64 << 20
"""A batch of more than this is made into Python objects row by row, and a batch of lines ends there."""
DICTIONARY_BYTES = 64 << 20
LINE_BYTES = 256 << 20
"""A longer line is not read to its end."""
NAMES_SHOWN = 20
LFS_POINTER = b"version https://git-lfs"


class Batch(NamedTuple):
    """Up to BATCH_ROWS rows of one file, read but not yet made into Python objects."""

    path: Path
    first: int
    """Number of the first row in its file, from 1."""
    rows: Callable[[], list[Row]]
    """Makes the rows; raises InputError for one that is no object or lacks a column. One that is too large to be made is empty."""


class MissingColumnError(InputError):
    """A file or row without a column that the format needs."""

    def __init__(self, place: str, name: str, found: Sequence[str]) -> None:
        super().__init__("data-columns", f"{place} has no column {name!r}, only {_some(found)}: choose the data.format that fits")
        self.place, self.name, self.found = place, name, list(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return MissingColumnError, (self.place, self.name, self.found)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(name[:100] for name in names[:NAMES_SHOWN]) + more


def files_of(path: Path) -> list[Path]:
    """The file itself, or all data files of a folder and its subfolders, sorted by name; other files are left alone, and hidden ones.

    Raises:
        InputError: there is no such file, or none in the folder.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file() and not _is_hidden(file.relative_to(path)))
        if not files:
            raise InputError("data-missing", f"{path} holds no file that ends in one of {', '.join(READERS)}")
        return files
    if not path.is_file():
        raise InputError("data-missing", f"{path} is no file and no folder: set data.train_file and data.test_file to existing ones")
    if path.suffix not in READERS:
        raise InputError("data-suffix", f"{path} ends in {path.suffix!r}: expected one of {', '.join(READERS)}")
    return [path]


def _is_hidden(file: Path) -> bool:
    """Whether other programs keep it for themselves: .ipynb_checkpoints/, _temporary/."""
    return any(part.startswith((".", "_")) for part in file.parts)


def read_batches(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Batch]:
    """The rows of a .parquet, .json (an array of objects) or .jsonl file, or of a folder of them, in order.

    Args:
        columns: Must be there.
        optional: Read where they are there.

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
        yield from READERS[file.suffix](file, columns, optional)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, read_dictionary=_dictionaries(path)) as file:
            _require(path, columns, file.schema_arrow.names)
            wanted = [name for name in file.schema_arrow.names if name in {*columns, *optional}]
            first = 1
            # A row group at a time: a dictionary ends with it.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    yield Batch(path, first, partial(_table_rows, path, batch))
                    first += batch.num_rows
    except MemoryError as error:
        raise MachineError("out-of-memory", f"{path} expands beyond this machine's memory ({error}): is it what it says to be?") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None


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


def _table_rows(path: Path, batch: pa.RecordBatch) -> list[Row]:
    if batch.nbytes > BATCH_BYTES and batch.num_rows > 1:
        return [row for place in range(batch.num_rows) for row in _table_rows(path, batch.slice(place, 1))]
    if batch.nbytes > BATCH_BYTES:
        # One row of so many bytes: a few of the file's may stand for it, repeated. No conversation is as long.
        return [{}]
    names = batch.schema.names
    try:
        return [dict(zip(names, values, strict=True)) for values in zip(*map(to_python, batch.columns), strict=True)]
    except (pa.ArrowException, ValueError, OverflowError, LookupError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError("data-damaged", f"{path} can't be read as parquet ({error}): it is damaged or cut off, fetch it again")


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
    elif pa.types.is_dictionary(kind):
        texts = array.dictionary.to_pylist()
        return [None if index is None else texts[index] for index in array.indices.to_pylist()]
    else:
        return list(array.to_pylist())
    if array.null_count:
        values = [value if there else None for value, there in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _jsonl(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    first = 1
    lines: list[tuple[str, bytes]] = []
    size = number = 0
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise InputError("data-damaged", f"{path}:{number} is longer than {LINE_BYTES:,} bytes: is it one JSON object a line?")
            if line.strip():
                lines.append((f"{path}:{number}", line))
                size += len(line)
            if len(lines) == BATCH_ROWS or size > BATCH_BYTES:
                yield Batch(path, first, partial(_parsed_rows, lines, columns, optional))
                first += len(lines)
                lines, size = [], 0
    if lines:
        yield Batch(path, first, partial(_parsed_rows, lines, columns, optional))


def _parsed_rows(lines: list[tuple[str, bytes]], columns: Sequence[str], optional: Sequence[str]) -> list[Row]:
    return [_checked(place, _parsed(place, line), columns, optional) for place, line in lines]


def _json(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Batch]:
    rows = _parsed(str(path), path.read_bytes())
    if not isinstance(rows, list):
        raise InputError("data-damaged", f"{path} holds {type(rows).__name__}, expected an array of objects")
    for start in range(0, len(rows), BATCH_ROWS):
        yield Batch(path, start + 1, partial(_array_rows, path, rows, start, columns, optional))


def _array_rows(path: Path, rows: list[Any], start: int, columns: Sequence[str], optional: Sequence[str]) -> list[Row]:
    batch = enumerate(rows[start : start + BATCH_ROWS], start=start + 1)
    return [_checked(f"{path}: row {number}", row, columns, optional) for number, row in batch]


READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterator[Batch]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _jsonl,
}


def _parsed(place: str, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError("data-damaged", f"{place} is not JSON ({error}): fix or fetch it again") from None


def _checked(place: str, row: Any, columns: Sequence[str], optional: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise InputError("data-damaged", f"{place} holds {type(row).__name__}, expected an object")
    _require(place, columns, list(row))
    return {name: row[name] for name in (*columns, *optional) if name in row}


def _require(place: object, columns: Sequence[str], found: Sequence[str]) -> None:
    for name in columns:
        if name not in found:
            raise MissingColumnError(str(place), name, found)
