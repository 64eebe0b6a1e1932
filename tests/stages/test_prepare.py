"""The stage as a function, on files made for the purpose."""

import datetime
import json
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora import params
from qlora.core.errors import InputError
from qlora.core.files import read_jsonl
from qlora.data.readers import BATCH_ROWS
from qlora.params.data import DataParams
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
    changed = values.model_copy(update={"data": DataParams(**data), "runtime": values.runtime.model_copy(update={"num_workers": num_workers})})
    prepare(changed, prepared=tmp_path / "prepared", report=tmp_path / "prepare.json", notes=tmp_path / "notes")
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
    with pytest.raises(InputError, match=r"row 1: wrong_type \(messages\[0\].role is 1 \(int\), expected text"):
        run(tmp_path, rows, on_invalid="error")


@pytest.mark.parametrize("content", [b"bytes", datetime.timedelta(1), Decimal("1.5"), {"a": "b"}])
def test_contents_that_are_no_text_are_named_whatever_they_are(tmp_path: Path, content: Any) -> None:
    rows = [{"messages": [{"content": content, "role": "user"}], "category": "c"}]
    with pytest.raises(InputError, match=r"row 1: wrong_type \(messages\[0\].content is .*, expected text"):
        run(tmp_path, rows, on_invalid="error")


def test_a_category_of_any_type_becomes_text(tmp_path: Path) -> None:
    rows = [{**row(number), "category": number % 2} for number in range(50)]
    made = run(tmp_path, rows, [{"messages": row(1000)["messages"]}])
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


def said(question: str, answer: str = "a", system: str | None = None) -> dict[str, Any]:
    messages = [{"content": system, "role": "system"}] if system else []
    return {"messages": [*messages, {"content": question, "role": "user"}, {"content": answer, "role": "assistant"}], "category": "c"}


def test_of_duplicates_the_first_is_kept(tmp_path: Path) -> None:
    rows = [*(row(number) for number in range(50)), said("What is it?"), said(" WHAT is\tit?"), said("What is it?", "b")]
    made = run(tmp_path, rows)
    lines = made["train"] + made["validation"]
    assert [line["messages"][1]["content"] for line in lines if "it?" in line["messages"][1]["content"]] == ["What is it?"] * 2
    assert made["report"]["duplicates"] == 1
    assert sum(made["report"][split]["dropped"].get("duplicate", 0) for split in ("train", "validation")) == 1


def test_duplicates_stay_or_end_the_run_when_asked(tmp_path: Path) -> None:
    rows = [*(row(number) for number in range(50)), row(7)]
    made = run(tmp_path, rows, on_duplicate="keep")
    assert len(made["train"] + made["validation"]) == 51
    assert made["report"]["duplicates"] == 1
    with pytest.raises(InputError, match=r"data-duplicate\] .*train.parquet: row 51 came before"):
        run(tmp_path, rows, on_duplicate="error")


def test_answers_to_one_prompt_are_in_one_split(tmp_path: Path) -> None:
    rows = [said(f"question {number}", f"answer {answer}", system) for number in range(60) for answer, system in enumerate((None, "s", "t"))]
    made = run(tmp_path, rows, test_file=str(tmp_path / "train.parquet"), test_fraction=0.2)
    places: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for line in made[split]:
            places.setdefault(line["messages"][1]["content"], set()).add(split)
    assert len(places) == 60
    assert all(len(splits) == 1 for splits in places.values())
    assert made["report"]["leakage"]["test_rows"] == 0


LEAKS = [said("Where is the house?", "here"), said("  where IS the\nhouse? ", "there"), said("\uff37here is the house?", system="s")]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_test_prompt_in_train_ends_the_run_with_both_rows(tmp_path: Path, leak: dict[str, Any]) -> None:
    rows = [*(row(number) for number in range(50)), leak]
    test = [row(1000), said("Where is the house?")]
    with pytest.raises(
        InputError, match=r"prompts of 1 of 2 test rows, a share of 0.5; data.max_leakage is 0:\n.*test.parquet: row 2 = .*train.parquet: row 51\n"
    ):
        run(tmp_path, rows, test)
    assert not (tmp_path / "prepare.json").exists()


def test_leakage_is_tolerated_up_to_the_limit_or_dropped_from_train(tmp_path: Path) -> None:
    rows = [*(row(number) for number in range(50)), *LEAKS]
    test = [row(1000), said("Where is the house?")]
    clean = run(tmp_path, rows[:50], test)
    made = run(tmp_path, rows, test, max_leakage=0.5)
    assert len(made["train"] + made["validation"]) == 53
    assert made["report"]["leakage"]["test_rows"] == 1
    made = run(tmp_path, rows, test, on_leakage="drop")
    assert [made[split] for split in ("train", "validation", "test")] == [clean[split] for split in ("train", "validation", "test")]
    assert sum(made["report"][split]["dropped"].get("leaked", 0) for split in ("train", "validation")) == 3


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "b").mkdir(parents=True)
    rows = [row(number) for number in range(60)]
    pq.write_table(pa.Table.from_pylist(rows[:20]), folder / "a.parquet")
    (folder / "b" / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows[20:40]), encoding="utf-8")
    (folder / "c.json").write_text(json.dumps(rows[40:]), encoding="utf-8")
    (folder / "README.md").write_text("not data", encoding="utf-8")
    made = run(tmp_path, rows)
    from_folder = run(tmp_path, [], train_file=str(folder))
    assert sorted(Path(name).name for name in from_folder["report"].pop("files")) == ["a.parquet", "b.jsonl", "c.json", "test.parquet"]
    assert sorted(Path(name).name for name in made["report"].pop("files")) == ["test.parquet", "train.parquet"]
    assert from_folder == made


def test_hidden_files_of_a_folder_are_left_alone_and_a_folder_may_end_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for name in ("part.jsonl/part.jsonl", ".ipynb_checkpoints/part.jsonl", "_temporary/part.jsonl"):
        (folder / name).parent.mkdir(parents=True)
        text = "".join(json.dumps(row(number)) + "\n" for number in range(50)) if name.startswith("part") else "broken"
        (folder / name).write_text(text, encoding="utf-8")
    assert sum(run(tmp_path, [], train_file=str(folder))["report"][split]["rows_in"] for split in ("train", "validation")) == 50


def test_duplicates_of_a_carved_test_split_are_dropped_too(tmp_path: Path) -> None:
    rows = [row(number) for number in range(100)]
    carved = run(tmp_path, [*rows, *rows], test_file=str(tmp_path / "train.parquet"), test_fraction=0.5)
    assert carved["report"]["duplicates"] == run(tmp_path, [*rows, *rows])["report"]["duplicates"] == 100
    assert len({line["id"] for line in carved["test"]}) == len(carved["test"]) > 30
    assert carved["report"]["leakage"] == {"test_rows": 0}


def test_duplicates_and_leaks_are_found_in_train_and_validation_alike(tmp_path: Path) -> None:
    questions = [f"question {number}" for number in range(50)]
    rows = [said(question) for question in questions]
    doubled = run(tmp_path, [*rows, *rows])["report"]
    assert doubled["train"]["dropped"]["duplicate"] + doubled["validation"]["dropped"]["duplicate"] == 50
    assert doubled["validation"]["dropped"]["duplicate"] > 0
    others = [said(f"other {number}") for number in range(50)]
    leaked = run(tmp_path, [*rows, *others], rows, on_leakage="drop")["report"]
    assert leaked["train"]["dropped"]["leaked"] + leaked["validation"]["dropped"]["leaked"] == 50
    assert leaked["validation"]["dropped"]["leaked"] > 0


def test_a_row_without_a_text_counts_for_train(tmp_path: Path) -> None:
    picture = {"messages": [{"content": "<image>", "role": None}], "images": ["a.jpg"], "category": "c"}
    report = run(
        tmp_path,
        [*({**row(number), "images": []} for number in range(60)), *[picture] * 20],
        test_file=str(tmp_path / "train.parquet"),
        test_fraction=0.3,
    )["report"]
    assert [report[split]["dropped"] for split in ("train", "validation", "test")] == [{"image": 20}, {}, {}]


@pytest.mark.parametrize(("limit", "refused"), [(0.28, True), (0.29, False)])
def test_a_limit_is_the_share_that_is_still_allowed(tmp_path: Path, limit: float, refused: bool) -> None:
    """29 of 100: 0.29 * 100 is 28.999999999999996."""
    test = [said(f"question {number}") for number in range(100)]
    rows = [*test[:29], *(said(f"other {number}") for number in range(60))]
    if refused:
        with pytest.raises(InputError, match="data-leakage"):
            run(tmp_path, rows, test, max_leakage=limit)
    else:
        run(tmp_path, rows, test, max_leakage=limit)


def test_the_declared_format_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": f"question {number}", "input": "", "output": "a", "category": "c"} for number in range(50)]
    made = run(tmp_path, rows, rows[:1], format="alpaca", max_leakage=1.0)
    assert made["test"][0]["messages"][1:] == [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "a"}]


def test_another_format_is_recognised(tmp_path: Path) -> None:
    alpaca = [{"instruction": "a", "output": "b"}]
    with pytest.raises(InputError, match=r"no column 'messages', only instruction, output: .*; this looks like data.format: alpaca"):
        run(tmp_path, alpaca, alpaca)
    with pytest.raises(InputError, match=r"no column 'responze', .*data.columns: \{completion: COLUMN\}"):
        run(tmp_path, alpaca, alpaca, format="prompt_completion", columns={"prompt": "instruction", "completion": "responze"})
    with pytest.raises(InputError, match=r"data.columns names 'answer', which data.format: messages does not read; known: messages"):
        run(tmp_path, alpaca, alpaca, columns={"answer": "output"})


def test_both_kinds_of_conversation_are_read_under_both_names(tmp_path: Path) -> None:
    talks = [[{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "b"}] for number in range(50)]
    rows = [{"conversations": talk} for talk in talks]
    made = [run(tmp_path, rows, rows[:1], format=name, max_leakage=1.0) for name in ("messages", "sharegpt")]
    assert made[0]["train"] == made[1]["train"]
    assert len(made[0]["train"] + made[0]["validation"]) == 50


def test_a_bad_row_is_dropped_and_counted_or_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(row(number)) for number in range(50)]
    lines[30:30] = ['{"messages": 5}', '{"messages": [}', '{"messages": [{"role": "wizard", "content": "a"}]}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    report = run(tmp_path, [], train_file=str(path))["report"]
    assert report["files"][str(path)] == {"rows_in": 53, "rows_out": 50, "dropped": {"wrong_type": 1, "not_json": 1, "unknown_role": 1}}
    shown = capfd.readouterr().out
    assert f"{path}: 53 rows, 50 kept, dropped 1 wrong_type: row 31 (messages is 5, expected a list of" in shown
    assert "1 unknown_role: row 33 ('wizard')" in shown
    with pytest.raises(InputError, match=r"row 31: wrong_type \(messages is 5"):
        run(tmp_path, [], train_file=str(path), on_invalid="error")


def test_much_that_is_dropped_few_that_are_left_and_what_is_not_read_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{**row(number), "score": 5} for number in range(60)] + [{"messages": [], "score": None}] * 20
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = run(tmp_path, [], [row(1000)], train_file=str(path), on_invalid="drop")["report"]
    assert report["ignored"] == {"column 'score'": 60}
    shown = capfd.readouterr()
    told = shown.out + shown.err
    assert "20 of " in told
    assert "column 'score' is not read (60 times)" in told
    assert "the test split has 1 conversations" in told


def test_tools_reasoning_and_answers_that_are_not_learned_are_kept(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "5", "weight": 0},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}], "thinking": "so"},
        {"role": "tool", "content": "4", "name": "add"},
        {"role": "assistant", "content": "4"},
    ]
    special = {"messages": talk, "tools": [{"name": "add"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*(row(number) for number in range(50)), special])), encoding="utf-8")
    made = run(tmp_path, [], [row(1000)], train_file=str(path), system_message=None)
    (kept,) = (record for record in made["train"] + made["validation"] if "tools" in record)
    assert kept["tools"][0]["function"]["name"] == "add"
    assert kept["messages"][1] == {"role": "assistant", "content": "5", "learn": False}
    assert kept["messages"][3]["reasoning_content"] == "so"
    assert kept["messages"][3]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert made["report"]["train"]["assistant_turns"] + made["report"]["validation"]["assistant_turns"] == 52


def nested(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize("depth", [150, 240, 300, 900])
def test_a_row_of_any_form_costs_itself_alone(tmp_path: Path, depth: int) -> None:
    asked = {"role": "user", "content": "a"}
    deep = nested(depth)
    call = {"function": {"name": "f", "arguments": deep}}
    bad: list[dict[str, Any]] = [
        {"messages": [asked, {"role": "assistant", "content": "b", "tool_calls": [call]}]},
        {"messages": [asked, {"role": "assistant", "content": "b"}], "tools": [{"name": "f", "parameters": deep}]},
        {"messages": deep},
        {"messages": [{"role": deep, "content": "a"}]},
        {"messages": [asked, {"role": "assistant", "content": "b", "weight": deep}]},
        {"messages": "[{'role': 'user', 'content': '\\ud800'}, {'role': 'assistant', 'content': 'b'}]"},
        {"messages": "[{'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'f', 'arguments': {1: b'x'}}]}]"},
        {"messages": "[{[1]: 2}]"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*(row(number) for number in range(50)), *bad])), encoding="utf-8")
    record = run(tmp_path, [], [row(1000)], train_file=str(path))["report"]["files"][str(path)]
    assert record["rows_out"] == 50
    assert record["dropped"] in ({"wrong_type": 7, "weight": 1}, {"wrong_type": 8})


def mixture(tmp_path: Path, weights: dict[str, float], **changes: Any) -> dict[str, Any]:
    folder = tmp_path / "mixed"
    folder.mkdir(exist_ok=True)
    for name, start in (("chat", 0), ("code", 1000)):
        lines = [json.dumps(row(number)) for number in range(start, start + 400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {"weights": weights, "validation_fraction": 0.1, "system_message": None, **changes}
    return run(tmp_path, [], [row(5000)], train_file=str(folder), **values)


def test_a_file_of_a_mixture_is_drawn_from_or_repeated(tmp_path: Path) -> None:
    plain = mixture(tmp_path, {})
    made = mixture(tmp_path, {"code.jsonl": 0.5, "chat.jsonl": 2.25})
    files = {Path(name).name: record for name, record in made["report"]["files"].items()}
    drawn = Counter(line["source"] for line in made["train"])
    whole = Counter("code.jsonl" if int(line["messages"][0]["content"].split()[1]) >= 1000 else "chat.jsonl" for line in plain["train"])
    assert 0.4 < drawn["code.jsonl"] / whole["code.jsonl"] < 0.6
    assert 2.15 < drawn["chat.jsonl"] / whole["chat.jsonl"] < 2.35
    assert files["code.jsonl"]["dropped"] == {"not_drawn": whole["code.jsonl"] - drawn["code.jsonl"]}
    assert files["chat.jsonl"]["repeated"] == made["report"]["train"]["repeated"] == drawn["chat.jsonl"] - whole["chat.jsonl"]
    # Which rows are drawn is a function of their text; validation and test are as they were.
    assert mixture(tmp_path, {"code.jsonl": 0.5, "chat.jsonl": 2.25}, near_threshold=None)["train"] == made["train"]
    for split in ("validation", "test"):
        assert [line["messages"] for line in made[split]] == [line["messages"] for line in plain[split]]
    assert all("source" not in line for line in plain["train"])
    assert {line["source"] for line in made["test"]} == {"test.parquet"}
    ids = {line["id"] for line in made["train"]}
    assert ids < {line["id"] for line in plain["train"]}
    assert {line["id"] for line in mixture(tmp_path, {"code.jsonl": 0.75})["train"]} > {
        line["id"] for line in made["train"] if "code" in line["source"]
    }


def test_lines_that_are_written_again_do_not_hide_near_duplicates(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = [*(row(number) for number in range(1500)), said(LONG, "yes"), said(NEARLY, "yes")]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = run(tmp_path, [], [row(5000)], train_file=str(folder), weights={"a.jsonl": 2.0})
    assert made["report"]["near"]["duplicates"] == 1


def test_a_weight_of_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[data-weights\] data.weights names 'chats.jsonl', .* known are chat.jsonl, code.jsonl"):
        mixture(tmp_path, {"chats.jsonl": 0.5})


def test_what_a_row_says_beside_its_texts_counts_for_its_length_and_for_duplicates(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "Look it up."}
    call = [{"function": {"name": "find", "arguments": {"key": "a"}}}]
    other = [{"function": {"name": "find", "arguments": {"key": "b"}}}]
    special: list[dict[str, Any]] = [
        {"messages": [asked, {"role": "assistant", "content": "a", "reasoning_content": "x" * 1000}]},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": call}], "tools": [{"name": "find"}]},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": other}], "tools": [{"name": "find"}]},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": call}], "tools": [{"name": "find", "description": "Another."}]},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": call}], "tools": [{"name": "find"}]},
        {"messages": [asked, {"role": "assistant", "content": ""}], "tools": "["},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*(row(number) for number in range(50)), *special])), encoding="utf-8")
    report = run(tmp_path, [], [row(1000)], train_file=str(path), max_chars=500)["report"]
    dropped = report["files"][str(path)]["dropped"]
    assert dropped == {"too_many_chars": 1, "duplicate": 1, "bad_tool": 1}
    # They answer one question, so they are in one split whatever they call.
    made = run(tmp_path, [], [], train_file=str(path), test_file=str(path), test_fraction=0.3, max_chars=500)
    places = {split for split in ("train", "validation", "test") for line in made[split] if "tools" in line}
    assert len(places) == 1


LONG = " ".join(f"word{number}" for number in range(40))
NEARLY = LONG.replace("word20", "other")


def test_near_duplicates_and_near_leaks_are_counted_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [*(row(number) for number in range(50)), said(LONG, "yes"), said(NEARLY, "yes")]
    made = run(tmp_path, rows, [row(1000), said(LONG.replace("word5 ", "another "), "yes")], num_workers=2)
    assert made["report"]["near"] == {"compared": 3, "too_short": 51, "duplicates": 1, "leaked_test_rows": 1}
    assert len(made["train"] + made["validation"]) == 52
    shown = capfd.readouterr().out
    assert f"{tmp_path}/train.parquet: row 52 ~ {tmp_path}/train.parquet: row 51 (0.90)" in shown
    assert f"{tmp_path}/test.parquet: row 2 ~ {tmp_path}/train.parquet: row 51 (0.90)" in shown
    assert run(tmp_path, rows, near_threshold=None)["report"]["near"] is None
    assert run(tmp_path, rows, near_threshold=0.95)["report"]["near"]["duplicates"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_near_duplicates": 0.0}, r"data-near-duplicates\] 1 of 52 .*:\n .*train.parquet: row 52 ~ .*train.parquet: row 51 \(0.90\)"),
        ({"max_near_leakage": 0.49}, r"data-near-leakage\] 1 of 2 .*:\n .*test.parquet: row 2 ~ .*train.parquet: row 51 \(0.90\)"),
    ],
)
def test_near_duplicates_end_the_run_when_asked(tmp_path: Path, changes: dict[str, float], message: str) -> None:
    rows = [*(row(number) for number in range(50)), said(LONG, "yes"), said(NEARLY, "yes")]
    test = [row(1000), said(LONG.replace("word5 ", "another "), "yes")]
    with pytest.raises(InputError, match=message):
        run(tmp_path, rows, test, **changes)
    assert not (tmp_path / "prepare.json").exists()
    assert not list(tmp_path.glob("prepared/*"))
    run(tmp_path, rows, test, max_near_duplicates=0.02, max_near_leakage=0.5)


def test_near_duplicates_are_found_where_the_test_split_is_carved_out(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.sample([f"w{number}" for number in range(2000)], 40)) for _ in range(60)]
    rows = [said(one, "yes") for one in texts] + [said(f"{one} again", "yes") for one in texts]
    made = run(tmp_path, rows, test_file=str(tmp_path / "train.parquet"), test_fraction=0.3)
    prompts = {split: {line["messages"][1]["content"] for line in made[split]} for split in ("train", "validation", "test")}
    learned = prompts["train"] | prompts["validation"]
    leaked = sum(any(other in learned for other in (f"{one} again", one.removesuffix(" again"))) for one in prompts["test"])
    assert made["report"]["near"] == {
        "compared": 120,
        "too_short": 0,
        "duplicates": sum(f"{one} again" in learned and one in learned for one in texts),
        "leaked_test_rows": leaked,
    }
    assert leaked > 0


def test_a_conversation_of_too_many_characters_is_dropped_or_refused(tmp_path: Path) -> None:
    rows = [row(number) for number in range(30)]
    rows[4]["messages"][0]["content"] = "x" * 500
    report = run(tmp_path, rows, max_chars=400)["report"]
    dropped = {split: report[split]["dropped"] for split in ("train", "validation")}
    assert dropped == {"train": {"too_many_chars": 1}, "validation": {}}
    with pytest.raises(InputError, match=r"row 5: too_many_chars \(more than data.max_chars = 400\)"):
        run(tmp_path, rows, max_chars=400, on_invalid="error")
