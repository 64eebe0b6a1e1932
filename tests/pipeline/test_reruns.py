"""What runs again after which change: no more and no less."""

import json
import re
from pathlib import Path

import pytest

from tests.pipeline.clone import Clone, ran, tiny_rows
from tests.pipeline.test_deps import FOLDERS, STAGES, expected_code

TOOLS_ONLY = (
    "qlora/card/",
    "qlora/chatting.py",
    "qlora/equivalence.py",
    "qlora/gguf.py",
    "qlora/hub.py",
    "qlora/merging.py",
    "qlora/reproduction.py",
)
ALL = {"prepare", "baseline", "train", "evaluate"}


def test_nothing_changed_nothing_runs(built: Clone) -> None:
    assert built.repro() == set()
    assert built.run("dvc", "status") == "Data and pipelines are up to date.\n"
    assert built.run("git", "status", "--porcelain") == ""


def test_values_and_comments_that_change_no_result_run_nothing(built: Clone) -> None:
    built.set(runtime__num_workers=1, runtime__save_steps=1, runtime__progress=False)
    path = built.path / "params.yaml"
    path.write_text("# a comment\n" + path.read_text(encoding="utf-8").replace("  lora_alpha: 32", "  lora_alpha:   32 # another"), encoding="utf-8")
    assert built.repro() == set()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1e-3", {"train", "evaluate"}),
        ("sequence.packing=none", {"train", "evaluate"}),
        ("evaluate.max_new_tokens=2", {"baseline", "evaluate"}),
        ("runtime.num_workers=2", set()),
    ],
)
def test_an_override_runs_what_reads_it(built: Clone, override: str, expected: set[str]) -> None:
    assert ran(built.run("dvc", "exp", "run", "-S", override)) == expected


def test_another_test_file_does_not_retrain(built: Clone) -> None:
    rows = tiny_rows("test", 12)[8:]
    (built.path / "data/raw/micro/other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    built.set(data__test_file="data/raw/micro/other.jsonl")
    assert built.repro() == ALL - {"train"}


def test_an_edit_of_a_module_touches_exactly_the_stages_that_run_it(built: Clone) -> None:
    modules = {
        str(path.relative_to(built.path)) for top in ("qlora", "stages") for kind in ("*.py", "*.jinja") for path in (built.path / top).rglob(kind)
    }
    for module in modules:
        with (built.path / module).open("a", encoding="utf-8") as file:
            file.write("# edited\n")
    status = json.loads(built.run("dvc", "status", "--json"))
    for stage in STAGES:
        changed = {dep for entry in status[stage] for dep in entry.get("changed deps", {})}
        assert changed == expected_code(stage)
    covered = set().union(*(expected_code(stage) for stage in STAGES))
    unread = {module for module in modules if module not in covered and not module.startswith(FOLDERS)}
    # No result depends on runtime, nor on what tools alone import.
    tools = {module for module in modules if module.startswith(TOOLS_ONLY)}
    assert unread == {"qlora/params/runtime.py"} | tools


def test_a_new_file_in_a_folder_of_extensions_is_a_dependency(built: Clone) -> None:
    (built.path / "qlora/scoring/new.py").write_text("", encoding="utf-8")
    assert set(json.loads(built.run("dvc", "status", "--json"))) == {"baseline", "evaluate"}


def test_compiled_python_files_are_no_dependency(built: Clone) -> None:
    assert list((built.path / "qlora/scoring").glob("__pycache__/*.pyc")), "the run left none: the test shows nothing"
    assert not re.search(r"pycache|\.pyc", (built.path / "dvc.lock").read_text(encoding="utf-8"))


def test_test_can_be_carved_out_of_the_train_file(built: Clone) -> None:
    built.set(data__test_file="data/raw/micro/train.jsonl", data__test_fraction=0.2)
    assert built.repro("prepare") == {"prepare"}
    counts = built.json("metrics/prepare.json")
    assert sum(counts[split]["rows_in"] for split in ("train", "validation", "test")) == 60
    ids = [
        {json.loads(line)["id"] for line in (built.path / f"data/prepared/{split}.jsonl").read_text(encoding="utf-8").splitlines()}
        for split in ("train", "validation", "test")
    ]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_a_stage_started_from_another_folder_says_so(built: Clone, tmp_path: Path) -> None:
    other = Clone(tmp_path)
    output = other.run("python", "-m", "stages.prepare", "--prepared", "a", "--report", "b", "--made-by", "c", fails=True, PYTHONPATH=str(built.path))
    assert "run from the repository's root" in output
