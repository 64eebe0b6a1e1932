"""Files that appear whole or not at all, with the same bytes for the same content."""

import csv
import io
import json
import os
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from qlora.core.errors import MachineError, UserFacingError
from qlora.core.text import visible

PROC = Path("/proc")
BUFFER_BYTES = 1 << 20
"""A line at a time through the default buffer of 8 kB costs a system call each."""

READ_BYTES = 1 << 22
"""Read at once where a file is hashed."""


@contextmanager
def atomic_writers(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open every path for writing beside its place; move all into place only when the block ends well."""
    # The process in the name keeps two workers of a queue apart that write the same file.
    partials = [path.with_name(f"{path.name}.{os.getpid()}.partial") for path in paths]
    for path in paths:
        _remove_abandoned(path)
    files: list[BinaryIO] = []
    try:
        for partial in partials:
            partial.parent.mkdir(parents=True, exist_ok=True)
            files.append(partial.open("wb", buffering=BUFFER_BYTES))
        yield files
        for file in files:
            file.close()
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for file in files:
            # On a full disk closing fails again; what must happen is the removal.
            with suppress(OSError):
                file.close()
        for partial in partials:
            partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """What a killed process left beside the place."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        if is_abandoned(partial):
            partial.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Whether it is called NAME.PROCESS.partial, as our writers call what they write aside, and that process is gone.

    False where the system does not list its processes: nothing is removed there.
    """
    process = path.name.split(".")[-2] if path.name.count(".") > 1 else ""
    return process.isdigit() and PROC.exists() and not (PROC / process).exists()


def json_line(record: Mapping[str, Any]) -> bytes:
    """One line of a .jsonl file in UTF-8, in the order of the record's keys, not escaped.

    >>> json_line({"b": "é", "a": 1}).decode()
    '{"b":"é","a":1}\\n'
    """
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_writers([path]) as (file,):
        file.writelines(map(json_line, records))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as lines:
        return [orjson.loads(line) for line in lines]


def json_document(record: Mapping[str, Any]) -> bytes:
    """A .json file in UTF-8: sorted keys, two spaces, numbers in full; raises ValueError for NaN and infinity."""
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_writers([path]) as (file,):
        file.write(json_document(record))


def write_metrics(path: Path, record: Mapping[str, float | None]) -> None:
    """A flat .json file that keeps the order of the record: DVC shows metrics in the order of the file."""
    with atomic_writers([path]) as (file,):
        file.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def update_json(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put the entry into a .json file under the name; its other entries stay, if they are such as we write."""
    try:
        document = json_document({**read_record(path), name: entry})
    except ValueError:
        # NaN or half a character, that json reads and does not write.
        document = json_document({name: entry})
    with atomic_writers([path]) as (file,):
        file.write(document)


def read_record(path: Path) -> dict[str, Any]:
    """The object of a .json file, empty where there is none that can be read: for notes and memories that a run can do without."""
    try:
        require_file(path)
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UserFacingError, OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def require_file(path: Path) -> None:
    """Refuse to read a pipe or a device, or a link to one, in a file's place: that would not end.

    Raises:
        MachineError: it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise MachineError("file-access", f"{path} is a pipe or a device and no file: something else lies there: move it away, then run again")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([neutral(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    with atomic_writers([path]) as (file,):
        file.write(text.getvalue().encode())


def neutral(text: str) -> str:
    """The text of a cell, in one line, which a spreadsheet does not take for a formula and a page of `dvc plots` not for markup.

    >>> neutral("=1+1"), neutral("<b>"), neutral("\\n=1")
    ("'=1+1", '＜b>', "'\\\\x0a=1")
    """
    # Some spreadsheets skip blanks and byte order marks, and take full-width signs for signs.
    first = unicodedata.normalize("NFKC", text).lstrip("\ufeff" + string.whitespace)[:1]
    shown = visible(text).replace("\n", "\\x0a").replace("\t", "\\x09").replace("<", "\uff1c")
    return ("'" if first in tuple("=+-@|") or text[:1] in tuple("\t\r\n\x1b\ufeff") else "") + shown


def read_points(path: Path) -> list[tuple[float, float]]:
    """Rows of two numbers under a header, as write_csv writes them."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(x), float(y)) for x, y in list(csv.reader(file))[1:]]
