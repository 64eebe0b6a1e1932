"""The harness on a task file of one's own, base and tuned, against this project's own likelihoods."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.clone import Clone

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
description: Answer only.
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|eot_id|>"], max_gen_toks: 3, do_sample: false}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 7}}
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROGRAM = """
import functools, shutil, sys
from pathlib import Path
import lm_eval.tasks
from qlora.core.errors import UserFacingError
from tools import benchmark

lm_eval.tasks.TaskManager = functools.cache(lm_eval.tasks.TaskManager)

def run(tasks, *others):
    sys.argv = ["benchmark", "--tasks", tasks, *others]
    try:
        benchmark.main()
    except UserFacingError as error:
        print(f"status {error.exit_code}: {error}")

include, rows, report = sys.argv[1:3], Path("tasks/rows.jsonl"), Path("metrics/benchmark.json")
run("mine", *include)
report.rename("first.json")
rows.write_text(rows.read_text(encoding="utf-8").replace('question": "', 'question": "Well, ', 1), encoding="utf-8")
run("mine", *include)
report.rename("second.json")
run("beauty", *include)
rows.unlink()
run("mine", *include)
assert not report.exists()
"""
"""In one process, with one index of the harness's thousands of tasks, since they take longer than the run.

The task, it with another document, an unknown one, it without its data.
"""


@pytest.fixture
def task(built: Clone) -> list[str]:
    """Its arguments. It asks the first question of each test conversation and expects what the tuned model answered in `evaluate`."""
    answers = {row["id"]: row["answer"] for row in lines(built.path / "data/predictions/tuned.jsonl") if row["turn"] == 0}
    rows = []
    for conversation in lines(built.path / "data/prepared/test.jsonl"):
        assert conversation["messages"][0] == {"role": "system", "content": "Answer only."}
        rows.append({"question": conversation["messages"][1]["content"], "answer": answers[conversation["id"]]})
    folder = built.path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "mine.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"), encoding="utf-8")
    return ["--include", str(folder)]


def test_the_harness_hears_the_answers_of_the_evaluation_and_says_on_what_it_ran(built: Clone, task: list[str], tmp_path: Path) -> None:
    output = built.run("python", "-c", PROGRAM, *task, HF_HOME=str(tmp_path))
    record: Any = built.json("first.json")
    base, tuned = ([row["answer"] for row in lines(built.path / f"data/predictions/{name}.jsonl") if row["turn"] == 0] for name in ("base", "tuned"))
    assert record["tuned"]["mine"]["exact_match"] == 1
    assert record["base"]["mine"]["exact_match"] == pytest.approx(sum(map(str.__eq__, base, tuned)) / len(tuned))
    assert record["base"]["mine"]["exact_match"] < 1
    assert record["delta"]["mine"] == {"exact_match": 1 - record["base"]["mine"]["exact_match"]}
    assert "mine exact_match" in output
    ran_on = record["ran_on"]
    assert ran_on["task_versions"] == {"mine": 7}
    for name, digest in ran_on["adapter"]["sha256"].items():
        assert hashlib.sha256((built.path / "models/adapter" / name).read_bytes()).hexdigest() == digest
    assert ran_on["adapter"]["dvc_md5"] in (built.path / "dvc.lock").read_text(encoding="utf-8")
    assert ran_on["base_model"]["manifest_sha256"] == hashlib.sha256((built.path / "models/base/tiny.json").read_bytes()).hexdigest()
    assert built.run("dvc", "status") == "Data and pipelines are up to date.\n"

    again: Any = built.json("second.json")
    assert again["ran_on"].pop("documents_sha256") != ran_on.pop("documents_sha256"), "other documents have another hash"
    assert again["ran_on"] == ran_on

    assert "status 2: [benchmark-task] the harness knows no task 'beauty'" in output
    assert "status 3: [benchmark-data]" in output
    assert "Traceback" not in output


def test_without_the_harness_one_message_says_how_to_install_it(built: Clone, tmp_path: Path) -> None:
    (tmp_path / "absent" / "lm_eval").mkdir(parents=True)
    (tmp_path / "absent" / "lm_eval" / "__init__.py").write_text("raise ImportError(name='lm_eval')\n", encoding="utf-8")
    output = built.run("sh", "-c", "python -m tools.benchmark --tasks mine; echo status $?", PYTHONPATH=str(tmp_path / "absent"))
    assert "[benchmark-harness] lm_eval is not installed: pip install -r requirements-benchmark.txt" in output
    assert "status 3" in output
    assert "Traceback" not in output
    assert not (built.path / "metrics/benchmark.json").exists()
