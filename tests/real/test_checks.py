"""Duplicates and leaks among real rows: those planted are found, and no other."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora import params
from qlora.core.errors import InputError
from qlora.data.near_duplicates import MIN_WORDS
from stages.prepare import prepare

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(real_data: Callable[[str], Path]) -> list[Row]:
    return pq.read_table(real_data("no_robots_test.parquet")).to_pylist()


def report(tmp_path: Path, train: list[Row], test: list[Row], **changes: Any) -> Any:
    for name, made in (("train", train), ("test", test)):
        pq.write_table(pa.Table.from_pylist(made), tmp_path / f"{name}.parquet")
    values = params.load(Path("params.yaml"))
    files = {"train_file": str(tmp_path / "train.parquet"), "test_file": str(tmp_path / "test.parquet")}
    data = values.data.model_copy(update={**files, "system_message": None, "validation_fraction": 0.05, **changes})
    prepare(values.model_copy(update={"data": data}), prepared=tmp_path / "prepared", report=tmp_path / "prepare.json", notes=tmp_path)
    return json.loads((tmp_path / "prepare.json").read_text(encoding="utf-8"))


def spoken_words(row: Row) -> int:
    return sum(len(message["content"].split()) for message in row["messages"] if message["role"] != "system")


def edited(row: Row, edit: Callable[[str], str]) -> Row:
    return {**row, "messages": [{**message, "content": edit(message["content"])} for message in row["messages"]]}


def with_one_word_changed(rng: random.Random, row: Row) -> Row:
    """In any turn but the system's."""
    turns = [place for place, message in enumerate(row["messages"]) if message["role"] != "system"]
    turn = rng.choices(turns, [len(row["messages"][place]["content"].split()) for place in turns])[0]
    words = row["messages"][turn]["content"].split(" ")
    place = rng.choice([place for place, word in enumerate(words) if any(letter.isalnum() for letter in word)])
    words[place] = "zebra"
    messages = [dict(message) for message in row["messages"]]
    messages[turn]["content"] = " ".join(words)
    return {**row, "messages": messages}


def test_no_real_row_is_dropped_or_suspected(rows: list[Row], tmp_path: Path) -> None:
    for test, changes in ((rows[450:], {}), (rows[:1], {"test_file": str(tmp_path / "train.parquet"), "test_fraction": 0.1})):
        made = report(tmp_path, rows[:450], test, **changes)
        assert [made[split]["dropped"] for split in ("train", "validation", "test")] == [{}, {}, {}]
        assert (made["duplicates"], made["leakage"]) == (0, {"test_rows": 0})
        assert (made["near"]["duplicates"], made["near"]["leaked_test_rows"]) == (0, 0)


@pytest.mark.parametrize("shortest", [True, False])
def test_of_200_rows_with_one_word_changed_99_percent_are_found(rows: list[Row], tmp_path: Path, shortest: bool) -> None:
    rng = random.Random(0)
    long = sorted((row for row in rows if spoken_words(row) >= MIN_WORDS), key=spoken_words)
    chosen = long[:200] if shortest else rng.sample(long, 200)
    planted = [with_one_word_changed(rng, row) for row in chosen]
    others = [row for row in rows if row not in chosen]
    assert report(tmp_path, [*rows, *planted], others[:1], on_leakage="drop")["near"]["duplicates"] >= 198
    near = report(tmp_path, [*others, *planted], chosen, max_leakage=1.0)["near"]
    assert near["leaked_test_rows"] >= 198
    assert near["duplicates"] == 0


WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
EDITS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "case": str.swapcase,
    "width": lambda text: text.translate(WIDE),
    "spacing": lambda text: "  " + text.replace(" ", " \n\t ") + "\n",
}


@pytest.mark.parametrize("name", EDITS)
def test_every_leak_that_differs_by_case_width_or_spacing_is_caught(rows: list[Row], tmp_path: Path, name: str) -> None:
    leaked = [edited(row, EDITS[name]) for row in rows[:100]]
    made = report(tmp_path, rows, leaked, max_leakage=1.0)
    assert made["leakage"] == {"test_rows": 100}
    with pytest.raises(InputError, match="prompts of 100 of 100 test rows"):
        report(tmp_path, rows, leaked)
