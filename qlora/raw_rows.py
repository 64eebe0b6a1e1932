"""Raw data files as a stream of rows, in bounded memory."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
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
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            _require(path, columns, file.schema_arrow.names)
            wanted = [name for name in file.schema_arrow.names if name in {*columns, *optional}]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError("data-damaged", f"{path} can't be read as parquet ({error}): it is damaged or cut off, fetch it again") from None


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
        return json.loads(text)
    except ValueError as error:
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
