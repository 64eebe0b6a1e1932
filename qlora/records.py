"""Files that appear whole or not at all, with the same bytes for the same content."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def atomic_writers(paths: Sequence[Path]) -> Iterator[list[TextIO]]:
    """Open every path for writing beside its place; move all into place only when the block ends well."""
    partials = [path.with_name(path.name + ".partial") for path in paths]
    files: list[TextIO] = []
    try:
        for partial in partials:
            partial.parent.mkdir(parents=True, exist_ok=True)
            files.append(partial.open("w", encoding="utf-8", newline="\n"))
        yield files
        for file in files:
            file.close()
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for file in files:
            file.close()
        for partial in partials:
            partial.unlink(missing_ok=True)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of a .jsonl file, in the order of the record's keys, not escaped.

    >>> json_line({"b": "é", "a": 1})
    '{"b": "é", "a": 1}\\n'
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_writers([path]) as (file,):
        file.writelines(map(json_line, records))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Sorted keys, two spaces; numbers as they are, so that the file's numbers are the computed ones."""
    with atomic_writers([path]) as (file,):
        file.write(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_writers([path]) as (file,):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
