import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora.core.errors import InputError, MachineError
from qlora.data import readers
from qlora.data.readers import BATCH_ROWS, BadRow, Columns, Row, files_of, read_batches, to_python


def columns(required: list[str], optional: list[str] | None = None) -> Columns:
    return Columns({name: (name,) for name in required}, {name: (name,) for name in optional or []})


def read_rows(path: Path, required: list[str], optional: list[str] | None = None) -> list[Row | BadRow]:
    return [row for batch in read_batches(path, columns(required, optional)) for row in batch.rows().rows]


ROWS: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"é {number}"}], "category": "c"} for number in range(3)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"rows{suffix}", ROWS)
    assert list(read_rows(path, ["messages"], ["category"])) == ROWS
    assert list(read_rows(path, ["category"], ["absent"])) == [{"category": "c"}] * 3


def test_rows_keep_their_order_across_batches(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [{"n": number} for number in range(2 * BATCH_ROWS + 1)])
    assert [row["n"] for row in read_rows(path, ["n"]) if isinstance(row, dict)] == list(range(2 * BATCH_ROWS + 1))


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "data-missing"),
        (b"", "data-empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "data-lfs-pointer"),
        (b"[{", "data-damaged"),
    ],
)
def test_a_file_that_is_no_data_is_named(tmp_path: Path, suffix: str, content: bytes | None, code: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=code) as caught:
        list(read_rows(path, ["messages"]))
    assert str(path) in str(caught.value)


def test_a_cut_off_parquet_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="data-damaged"):
        list(read_rows(path, ["messages"]))


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", ROWS)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(InputError, match="data-damaged"):
        list(read_rows(path, ["messages"]))


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"rows{suffix}", [{"text": "a", "label": 1}])
    with pytest.raises(InputError, match="no column 'messages', only text, label"):
        list(read_rows(path, ["messages"]))


def bad(path: Path) -> list[tuple[str, str]]:
    return [row for row in read_rows(path, ["messages"]) if isinstance(row, BadRow)]


def test_a_bad_line_is_named_by_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n\n{"messages": [}\n7\n{"text": 1}\n{"messages": []}\n', encoding="utf-8")
    assert [reason for reason, _ in bad(path)] == ["not_json", "no_object", "missing_column"]
    assert [message.partition(" ")[0].rpartition("/")[2] for _, message in bad(path)] == ["rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"]
    assert len(read_rows(path, ["messages"])) == 5
    path.write_text('[{"messages": []}, 7, {"text": 1}, {"messages": []}]', encoding="utf-8")
    assert [reason for reason, _ in bad(path)] == ["no_object", "missing_column"]


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_text("a,b\n", encoding="utf-8")
    for name in ("rows.parquet.gz", "rows.arrow.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match="data-suffix"):
            list(read_rows(tmp_path / name, ["messages"]))
    with pytest.raises(
        InputError,
        match=r"\[data-suffix\] .*expected \.parquet, \.json, \.jsonl, \.arrow, \.csv, \.tsv, or \.json, .* with \.gz or \.zst",
    ):
        list(read_rows(path, ["messages"]))


def test_half_a_surrogate_pair_is_named_where_it_stands(tmp_path: Path) -> None:
    """It is no text: no output file could hold it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', encoding="utf-8")
    ((reason, message),) = bad(path)
    assert reason == "not_json"
    assert "rows.jsonl:1 is not JSON" in message


@pytest.mark.parametrize(
    "name", ["lines.json", "array.jsonl", "bom.jsonl", "bom.json", "lines.jsonl.gz", "lines.json.zst", "rows.csv.gz", "rows.tsv"]
)
def test_what_a_file_holds_is_told_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"question": f"é {number}\n,", "answer": '"b"'} for number in range(3)]
    array, lines = json.dumps(rows), "".join(json.dumps(row) + "\n" for row in rows)
    separator = "\t" if "tsv" in name else ","
    table = io.StringIO()
    writer = csv.DictWriter(table, ["question", "answer"], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    text = table.getvalue() if path.name.startswith("rows") else lines if "lines" in name or name == "bom.jsonl" else array
    content = ("\ufeff" * ("bom" in name) + text).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    assert read_rows(path, ["question", "answer"]) == rows
    assert readers.is_array(path) == (name in ("array.jsonl", "bom.json"))


def test_a_saved_dataset_is_read_and_its_notes_passed_over(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": f"é {number}"} for number in range(3)]).save_to_disk(tmp_path / "saved")
    assert [path.suffix for path in files_of(tmp_path / "saved")] == [".arrow"]
    assert read_rows(tmp_path / "saved", ["text"]) == [{"text": f"é {number}"} for number in range(3)]


def test_a_column_that_is_stored_as_json_is_read_as_what_it_means(tmp_path: Path) -> None:
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"a"', '[{"type":"text","text":"b"}]', None]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", ["text"]) == [{"text": "a"}, {"text": [{"type": "text", "text": "b"}]}, {"text": None}]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_of_several_names_the_one_that_holds_something_is_read(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": None, "question": "a"}, {"prompt": "b", "question": "c"}, {"prompt": None, "question": None}]
    path = written(tmp_path / f"rows{suffix}", rows)
    (batch,) = read_batches(path, Columns({"prompt": ("prompt", "question")}, {}))
    assert batch.rows().rows == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}]


def test_a_bad_line_of_a_table_costs_its_row_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"question,answer\na,b\na,b,c\n\xff,b\nc,d\n")
    rows = read_rows(path, ["question", "answer"])
    assert [row for row in rows if isinstance(row, dict)] == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    assert sorted(row.reason for row in rows if isinstance(row, BadRow)) == ["not_text", "wrong_columns"]


def test_half_a_surrogate_pair_in_an_array_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"messages": ["\\ud800"]}, {"messages": []}]', encoding="utf-8")
    assert [row.reason if isinstance(row, BadRow) else row for row in read_rows(path, ["messages"])] == ["no_object", {"messages": []}]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_column_may_have_other_names_and_what_is_not_known_is_counted(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"rows{suffix}", [{"question": "a", "id": 1, "verdict": "good"}] * 3)
    (batch,) = read_batches(path, Columns({"prompt": ("prompt", "question")}, {}))
    assert batch.rows() == ([{"prompt": "a"}] * 3, {"verdict": 3})


NESTED: list[Any] = [[{"a": 1, "b": ["x", None]}, None], None, [], [{"a": None, "b": None}], [{"a": 2, "b": []}]]


@pytest.mark.parametrize(("start", "length"), [(0, 5), (1, 3), (3, 2), (2, 0)])
def test_nested_values_are_those_that_pyarrow_gives(start: int, length: int) -> None:
    kind = pa.list_(pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]))
    for array in (pa.array(NESTED, kind), pa.array(NESTED, pa.large_list(kind.value_type)), pa.array(NESTED * 2, kind).slice(4)):
        assert to_python(array.slice(start, length)) == array.slice(start, length).to_pylist()


def test_a_struct_without_fields_and_a_null_struct() -> None:
    for array in (pa.array([{}, None], pa.struct([])), pa.array([{"a": "x"}, None], pa.struct([("a", pa.string())])).slice(1)):
        assert to_python(array) == array.to_pylist()


def test_texts_that_repeat_are_read_once_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": None, "content": None}] if number % 3 else None, "category": text}
        for number, text in enumerate(["a", "b", "a", "é", None, "a"] * 5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)

    def read() -> list[Any]:
        return [row for batch in readers.read_batches(tmp_path / "rows.parquet", columns(["messages"], ["category"])) for row in batch.rows().rows]

    assert readers._dictionaries(tmp_path / "rows.parquet")
    once = read()
    monkeypatch.setattr(readers, "DICTIONARY_BYTES", 0)
    assert readers._dictionaries(tmp_path / "rows.parquet") == []
    assert once == read() == rows


def test_a_batch_of_many_bytes_is_made_row_by_row_and_a_row_of_too_many_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * length} for length in (10, 5000, 10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", use_dictionary=False)
    monkeypatch.setattr(readers, "BATCH_BYTES", 1000)
    monkeypatch.setattr(readers, "DICTIONARY_BYTES", 0)
    made = [row for batch in readers.read_batches(tmp_path / "rows.parquet", columns(["text"])) for row in batch.rows().rows]
    assert made == [rows[0], {}, rows[2]]


def test_lines_are_batched_by_their_bytes_too_and_one_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{letter * 40}"}}\n\n' for letter in "abcde"), encoding="utf-8")
    monkeypatch.setattr(readers, "BATCH_BYTES", 100)
    batches = list(readers.read_batches(path, columns(["text"])))
    assert [(batch.first, len(batch.rows().rows)) for batch in batches] == [(1, 2), (3, 2), (5, 1)]
    monkeypatch.setattr(readers, "LINE_BYTES", 20)
    with pytest.raises(InputError, match=r"data-damaged\] .*rows.jsonl:1 is longer than 20 bytes"):
        list(readers.read_batches(path, columns(["text"])))


def test_a_file_that_expands_beyond_the_memory_is_a_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "rows.parquet")

    def no_memory(*_: Any, **__: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 500000000000 failed")

    monkeypatch.setattr(readers, "_dictionaries", no_memory)
    with pytest.raises(MachineError, match=r"out-of-memory\] .*rows.parquet expands beyond this machine's memory"):
        list(readers.read_batches(tmp_path / "rows.parquet", columns(["text"])))
