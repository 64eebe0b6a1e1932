"""What the embedded dataset promises."""

import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.raw.tiny import make
from qlora.core.conversation import invalid_reason
from qlora.data.formats import FORMATS

FOLDER = Path(make.__file__).parent


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {split: pq.read_table(FOLDER / f"{split}-00000-of-00001.parquet").to_pylist() for split in ("train", "test")}


def questions(rows: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == "user"]


def test_the_committed_files_are_what_the_script_makes(splits: dict[str, list[dict[str, Any]]]) -> None:
    _, train, test = make.make()
    assert splits == {"train": train, "test": test}


def test_size_and_columns_are_as_promised(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.parquet")) <= 500_000
    assert len(splits["train"]) >= 2000
    assert len(splits["test"]) >= 200
    assert len({row["category"] for row in splits["test"]}) >= 5
    for row in itertools.chain(*splits.values()):
        assert list(row) == ["prompt", "prompt_id", "messages", "category"]
        assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode()).hexdigest()


def test_no_question_of_the_test_split_is_in_train_or_twice_in_test(splits: dict[str, list[dict[str, Any]]]) -> None:
    asked = questions(splits["test"])
    assert len(set(asked)) == len(asked)
    assert not set(asked) & set(questions(splits["train"]))


def test_no_question_of_the_test_split_is_in_the_pretraining_text(splits: dict[str, list[dict[str, Any]]]) -> None:
    asked = set(questions(splits["test"]))
    world, _, _ = make.make()
    drawn = itertools.islice(world.exercises({}), 50_000)
    assert not any(line in asked or line.removeprefix("Exercise: ") in asked for text, _ in drawn for line in text.splitlines())


def test_held_out_problems_are_never_drawn_again_in_any_wording() -> None:
    world = make.World(random.Random(0))
    world.held_out = {("addition", (low, high)) for low in range(10, 100) for high in range(low, 100) if (low, high) != (10, 10)}
    assert {world.turn("addition")[1] for _ in range(5)} == {"20"}


def test_rows_are_as_various_as_real_ones(splits: dict[str, list[dict[str, Any]]]) -> None:
    rows = splits["test"]
    first_roles = {row["messages"][0]["role"] for row in rows}
    assert first_roles == {"system", "user"}
    assert {sum(message["role"] == "assistant" for message in row["messages"]) for row in rows} == {1, 2, 3}
    assert any(not row["prompt"].isascii() for row in rows)


def test_every_fault_that_prepare_catches_is_there_and_only_in_train(splits: dict[str, list[dict[str, Any]]]) -> None:
    reasons = {split: {invalid_reason(FORMATS["messages"].to_messages(row)) for row in rows} for split, rows in splits.items()}
    assert reasons["test"] == {None}
    assert reasons["train"] == {
        None,
        "no_messages",
        "unknown_role",
        "empty_content",
        "system_not_first",
        "roles_do_not_alternate",
        "no_final_answer",
    }


def test_every_answer_is_right(splits: dict[str, list[dict[str, Any]]]) -> None:
    """Worked out here from the question alone, for the categories where that is a line."""
    import re

    answers = {
        "addition": lambda text: str(sum(map(int, re.findall(r"\d+", text)))),
        "capitals": lambda text: re.findall(r'"(.*)"', text)[0].upper(),
        "compare": lambda text: str((max if "larger" in text else min)(map(int, re.findall(r"\d+", text)))),
        "letter": lambda text: re.findall(r'"(.*)"', text)[0][0 if "first" in text else -1],
        "order": lambda text: " ".join(sorted(re.findall(r"\b[a-z]\b", text))),
        "repeat": lambda text: " ".join(re.findall(r'"(.*)"', text) * 2),
        "spell": lambda text: "-".join(re.findall(r'"(.*)"', text)[0]),
        "successor": lambda text: str(int(re.findall(r"\d+", text)[0]) + (1 if "after" in text else -1)),
    }
    checked = 0
    for row in splits["test"]:
        turns = [message for message in row["messages"] if message["role"] != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert answer["content"] == answers[row["category"]](question["content"]), question
            checked += 1
    assert checked == len(questions(splits["test"]))
