"""The stage as a function, on files made for the purpose."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora import params
from qlora.errors import InputError
from qlora.params.data import DataParams
from qlora.raw_rows import BATCH_ROWS
from qlora.records import read_jsonl
from stages.prepare import prepare


def row(number: int, *roles: str, **columns: Any) -> dict[str, Any]:
    messages = [{"content": f"{role} {number}", "role": role} for role in roles or ("user", "assistant")]
    return {"messages": messages, "category": "c", **columns}


def run(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None, num_workers: int = 1, **changes: Any
) -> dict[str, Any]:
    """Prepare these rows; returns the report and each split's lines."""
    files = {"train": train, "test": test if test is not None else [row(10_000)]}
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    values = params.load(Path("params.yaml"))
    data = values.data.model_dump() | {
        "train_file": str(tmp_path / "train.parquet"),
        "test_file": str(tmp_path / "test.parquet"),
        "validation_fraction": 0.2,
        **changes,
    }
    runtime = values.runtime.model_copy(update={"num_workers": num_workers})
    prepare(DataParams(**data), runtime, prepared=tmp_path / "prepared", report=tmp_path / "prepare.json")
    found = json.loads((tmp_path / "prepare.json").read_text(encoding="utf-8"))
    splits = {split: read_jsonl(tmp_path / "prepared" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {"report": found, **splits}


def test_a_line_holds_id_category_and_messages_and_nothing_else(tmp_path: Path) -> None:
    made = run(tmp_path, [row(number, prompt="p", prompt_id="x") for number in range(50)])
    for line in (*made["train"], *made["validation"], *made["test"]):
        assert list(line) == ["id", "category", "messages"]
        assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]
        assert line["messages"][0]["content"] == "Answer only."
        assert all(list(message) == ["role", "content"] for message in line["messages"])


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    broken = [row(100, "user", "user"), row(101), row(102, "user"), {"messages": None, "category": "c"}]
    made = run(tmp_path, [*(row(number) for number in range(60)), *broken])
    report = made["report"]
    assert report["train"]["rows_in"] + report["validation"]["rows_in"] == 64
    for split in ("train", "validation", "test"):
        assert report[split]["rows_in"] == report[split]["rows_out"] + sum(report[split]["dropped"].values())
        assert report[split]["rows_out"] == len(made[split])
    dropped = {**report["train"]["dropped"], **report["validation"]["dropped"]}
    assert dropped == {"roles_do_not_alternate": 1, "no_final_answer": 1, "no_messages": 1}


def test_a_system_turn_of_its_own_stays(tmp_path: Path) -> None:
    made = run(tmp_path, [row(number, "system", "user", "assistant") for number in range(50)])
    assert all(line["messages"][0]["content"].startswith("system ") for line in made["train"])


def test_no_system_message_when_none_is_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, [row(number) for number in range(50)], system_message=None)
    assert all([message["role"] for message in line["messages"]] == ["user", "assistant"] for line in made["train"])


def test_the_system_message_moves_no_row_to_another_split(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    ids = [[line["id"] for line in run(tmp_path, rows, system_message=text)["validation"]] for text in ("a", None)]
    assert ids[0] == ids[1]


def test_the_test_file_changes_no_byte_of_train(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    run(tmp_path, rows, [row(1000)])
    first = (tmp_path / "prepared" / "train.jsonl").read_bytes()
    run(tmp_path, rows, [row(2000), row(2001)])
    assert (tmp_path / "prepared" / "train.jsonl").read_bytes() == first


def test_text_of_every_script_comes_through(tmp_path: Path) -> None:
    text = '日本語 – éß \u2028 \U0001f600 \\ " \x00'
    made = run(
        tmp_path,
        [
            *(row(number) for number in range(50)),
            {"messages": [{"content": text, "role": "user"}, {"content": text, "role": "assistant"}], "category": "c"},
        ],
    )
    contents = [message["content"] for line in made["train"] + made["validation"] for message in line["messages"]]
    assert contents.count(text) == 2


def test_an_invalid_row_ends_the_run_when_asked_and_what_was_there_stays(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    before = run(tmp_path, rows)
    with pytest.raises(InputError, match=r"train.parquet: row 51: roles_do_not_alternate, roles \['user', 'user'\]"):
        run(tmp_path, [*rows, row(100, "user", "user")], on_invalid="error")
    assert json.loads((tmp_path / "prepare.json").read_text(encoding="utf-8")) == before["report"]
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]


def test_wrong_types_inside_messages_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [{"content": 5, "role": 1}], "category": "c"}]
    with pytest.raises(InputError, match=r"row 1: messages\[0\].role is 1 \(int\), expected text"):
        run(tmp_path, rows)


@pytest.mark.parametrize("content", [b"bytes", datetime.timedelta(1), Decimal("1.5"), {"a": "b"}])
def test_contents_that_are_no_text_are_named_whatever_they_are(tmp_path: Path, content: Any) -> None:
    rows = [{"messages": [{"content": content, "role": "user"}], "category": "c"}]
    with pytest.raises(InputError, match=r"row 1: messages\[0\].content is .*, expected text"):
        run(tmp_path, rows)


def test_a_category_of_any_type_becomes_text(tmp_path: Path) -> None:
    rows = [{**row(number), "category": number % 2} for number in range(50)]
    made = run(tmp_path, rows, [{"messages": row(1)["messages"]}])
    assert {line["category"] for line in made["train"]} == {"0", "1"}
    assert made["test"][0]["category"] == "all"


def test_a_split_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the test split has no usable conversation \(1 rows in, dropped: \{'no_final_answer': 1\}\)"):
        run(tmp_path, [row(number) for number in range(50)], [row(1, "user")])
    with pytest.raises(InputError, match="the validation split has no usable conversation"):
        run(tmp_path, [row(1)], validation_fraction=0.01)


def test_no_validation_when_none_is_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, [row(1), row(2)], validation_fraction=0.0)
    assert (len(made["train"]), len(made["validation"])) == (2, 0)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_the_number_of_processes_changes_no_byte(tmp_path: Path, suffix: str) -> None:
    rows = [row(number, *(["user"] if number % 100 == 7 else ["user", "assistant"])) for number in range(3 * BATCH_ROWS + 5)]
    path = tmp_path / f"rows.{suffix}"
    match suffix:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "jsonl":
            path.write_text("".join(json.dumps(one) + "\n\n" for one in rows), encoding="utf-8")
        case "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
    made = []
    for num_workers in (1, 2, 5):
        run(tmp_path, [], num_workers=num_workers, train_file=str(path), test_file=str(path))
        made.append([file.read_bytes() for file in (*sorted((tmp_path / "prepared").iterdir()), tmp_path / "prepare.json")])
    assert made[0] == made[1] == made[2]
    assert json.loads(made[0][-1])["train"]["rows_in"] > BATCH_ROWS


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_bad_row_is_named_by_its_number_whichever_process_reads_it(tmp_path: Path, num_workers: int) -> None:
    rows = [row(number) for number in range(2 * BATCH_ROWS)]
    rows[BATCH_ROWS + 9] = row(1, "user", "user")
    with pytest.raises(InputError, match=f"row {BATCH_ROWS + 10}: roles_do_not_alternate"):
        run(tmp_path, rows, num_workers=num_workers, on_invalid="error")
