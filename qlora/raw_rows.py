"""Raw data files as a stream of rows: parquet and jsonl in bounded memory, a json array as a whole."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qlora.errors import InputError

Row = dict[str, Any]
Batch = tuple[int, list[Row]]
"""Number of the first row, from 1, and the rows."""
BATCH_ROWS = 1024
LFS_POINTER = b"version https://git-lfs"


def read_batches(path: Path, columns: Sequence[str], optional: Sequence[str] = (), *, share: int = 0, shares: int = 1) -> Iterator[Batch]:
    """The rows of a .parquet, .json (an array of objects) or .jsonl file, in order, BATCH_ROWS at a time.

    Args:
        columns: Must be there.
        optional: Read where they are there.
        share: Of `shares` readers of the same file this one takes every shares-th batch from this one on.

    Raises:
        InputError: the file is missing, empty, a Git-LFS pointer, damaged, or lacks a column.
    """
    if not path.is_file():
        raise InputError("data-missing", f"{path} is not a file: set data.train_file and data.test_file to existing files")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError("data-suffix", f"{path} ends in {path.suffix!r}: expected one of {', '.join(READERS)}")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise InputError("data-empty", f"{path} is empty (0 bytes): fetch it again")
    if head == LFS_POINTER:
        raise InputError("data-lfs-pointer", f"{path} is a Git-LFS pointer, not data: run `git lfs pull` or download the file itself")
    return reader(path, columns, optional, share, shares)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str], share: int, shares: int) -> Iterator[Batch]:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _require(path, columns, file.schema_arrow.names)
            wanted = [name for name in file.schema_arrow.names if name in {*columns, *optional}]
            first = 1
            for index, batch in enumerate(file.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False)):
                if index % shares == share:
                    values = zip(*(to_python(batch.column(name)) for name in wanted), strict=True)
                    yield first, [dict(zip(wanted, row, strict=True)) for row in values]
                first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError("data-damaged", f"{path} can't be read as parquet ({error}): it is damaged or cut off, fetch it again") from None


def to_python(array: pa.Array) -> list[Any]:
    """The array's values, like array.to_pylist() and several times as fast for lists of structs.

    Flat columns become Python objects at once, and lists and dicts are made of those; pyarrow makes one scalar per value.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [to_python(column) for column in array.flatten()]
        # One dict per message of the data set: `strict` would cost a tenth of the reading.
        values: list[Any] = [dict(zip(names, row)) for row in zip(*columns)] if names else [{} for _ in range(len(array))]  # noqa: B905
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_pylist()
        items = to_python(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        values = [items[start - offsets[0] : end - offsets[0]] for start, end in pairwise(offsets)]
    else:
        return list(array.to_pylist())
    if array.null_count:
        values = [value if there else None for value, there in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _jsonl(path: Path, columns: Sequence[str], optional: Sequence[str], share: int, shares: int) -> Iterator[Batch]:
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for index in count():
            batch = list(islice(lines, BATCH_ROWS))
            if not batch:
                return
            if index % shares == share:
                rows = [_checked(f"{path}:{number}", _parsed(f"{path}:{number}", line), columns, optional) for number, line in batch]
                yield index * BATCH_ROWS + 1, rows


def _json(path: Path, columns: Sequence[str], optional: Sequence[str], share: int, shares: int) -> Iterator[Batch]:
    rows = _parsed(str(path), path.read_bytes())
    if not isinstance(rows, list):
        raise InputError("data-damaged", f"{path} holds {type(rows).__name__}, expected an array of objects")
    for start in range(share * BATCH_ROWS, len(rows), shares * BATCH_ROWS):
        batch = enumerate(rows[start : start + BATCH_ROWS], start=start + 1)
        yield start + 1, [_checked(f"{path}: row {number}", row, columns, optional) for number, row in batch]


READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str], int, int], Iterator[Batch]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _jsonl,
}


def _parsed(place: str, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError("data-damaged", f"{place} is not JSON ({error}): mend or fetch it again") from None


def _checked(place: str, row: Any, columns: Sequence[str], optional: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise InputError("data-damaged", f"{place} holds {type(row).__name__}, expected an object")
    _require(place, columns, list(row))
    return {name: row[name] for name in (*columns, *optional) if name in row}


def _require(place: object, columns: Sequence[str], found: Sequence[str]) -> None:
    for name in columns:
        if name not in found:
            raise InputError("data-columns", f"{place} has no column {name!r}, only {', '.join(found)}: choose the data.format that fits")
