"""Raw data files as a stream of rows: parquet and jsonl in bounded memory, a json array as a whole."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qlora.errors import InputError

Row = dict[str, Any]
BATCH_ROWS = 1024
LFS_POINTER = b"version https://git-lfs"


def read_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of a .parquet, .json (an array of objects) or .jsonl file, in order, with the columns asked for.

    Args:
        columns: Must be there.
        optional: Read where they are there.

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
    return reader(path, columns, optional)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _require(path, columns, file.schema_arrow.names)
            wanted = [name for name in file.schema_arrow.names if name in {*columns, *optional}]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False):
                columns_of_batch = [to_python(batch.column(name)) for name in wanted]
                yield from (dict(zip(wanted, values, strict=True)) for values in zip(*columns_of_batch, strict=True))
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
        values: list[Any] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if names else [{} for _ in range(len(array))]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # `flatten` leaves out what lies under a null list, so the lengths say where each list ends.
        items = to_python(array.flatten())
        lengths = pc.list_value_length(array).fill_null(0).to_pylist()
        values = [items[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]
    else:
        return list(array.to_pylist())
    if array.null_count:
        values = [value if there else None for value, there in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _jsonl(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _parsed(f"{path}:{number}", line)
                yield _checked(f"{path}:{number}", row, columns, optional)


def _json(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    rows = _parsed(str(path), path.read_bytes())
    if not isinstance(rows, list):
        raise InputError("data-damaged", f"{path} holds {type(rows).__name__}, expected an array of objects")
    for number, row in enumerate(rows, start=1):
        yield _checked(f"{path}: row {number}", row, columns, optional)


READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterator[Row]]] = {
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
