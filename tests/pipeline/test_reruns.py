"""What runs again after which change: no more and no less. Mostly as `dvc status` tells it, which runs nothing."""

import json
import re
from pathlib import Path
from typing import Any

from tests.pipeline.clone import Clone, tiny_rows
from tests.pipeline.wiring import NOBODYS, STAGES, code_listed, is_within, outputs

MODEL = {"baseline", "train", "predict"}
EDITS = {
    "qlora/core/text.py": set(STAGES),
    "qlora/data/cleaning.py": {"prepare"},
    "qlora/model/loading.py": MODEL,
    "qlora/model/chat_templates/vicuna.jinja": MODEL,
    "qlora/prediction/generation.py": {"baseline", "predict"},
    "qlora/training/trainer.py": {"train"},
    "qlora/scoring/metrics/bleu.py": {"evaluate"},
    "qlora/scoring/report/__init__.py": {"evaluate"},
    "qlora/scoring/report/page.css": {"evaluate"},
    "stages/predict.py": {"baseline", "predict"},
    "qlora/params/lora.py": {"train"},
}
"""The stages that are changed by a comment in a file; none runs after them while they make the same bytes."""
NO_STAGES = [
    "qlora/params/runtime.py",
    "qlora/runtime/launcher.py",
    "qlora/delivery/hub.py",
    "tools/compare.py",
    "benchmarks/torture.py",
    "README.md",
]
VALUES: list[tuple[dict[str, Any], set[str]]] = [
    ({"data__max_chars": 1000}, {"prepare"}),
    ({"base_model__dtype": "bfloat16"}, MODEL),
    ({"chat__on_control_tokens": "drop"}, MODEL),
    ({"sequence__packing": "none"}, {"train"}),
    ({"train__learning_rate": 1e-3}, {"train"}),
    ({"predict__max_new_tokens": 2}, {"baseline", "predict"}),
    ({"evaluate__headline": ["nll"]}, {"evaluate"}),
    ({"evaluate__resamples": 2000}, {"evaluate"}),
    ({"hardware__num_threads": 2}, MODEL),
    ({"hardware__activation_checkpointing": True}, {"train"}),
]


def edit(clone: Clone, path: str) -> None:
    with (clone.path / path).open("a", encoding="utf-8") as file:
        file.write("/* edited */\n" if path.endswith("css") else "# edited\n")


def after(stages: set[str]) -> set[str]:
    """These stages and all that read what they make, directly or not."""
    made = {out for stage in stages for out in outputs(stage)}
    readers = {stage for stage, entry in STAGES.items() if made & set(entry["deps"])}
    return stages if readers <= stages else after(stages | readers)


def test_the_graph_says_what_runs_after_what() -> None:
    assert {stage: after({stage}) - {stage} for stage in STAGES} == {
        "prepare": set(STAGES) - {"prepare"},
        "baseline": {"evaluate"},
        "train": {"predict", "evaluate"},
        "predict": {"evaluate"},
        "evaluate": set(),
    }


def test_nothing_changed_nothing_runs(built: Clone) -> None:
    assert built.repro() == set()
    assert built.run("dvc", "status") == "Data and pipelines are up to date.\n"
    assert built.run("git", "status", "--porcelain") == ""


def test_values_and_comments_that_change_no_result_change_no_stage(built: Clone) -> None:
    built.set(runtime__num_workers=1, runtime__save_steps=1, runtime__progress=False)
    path = built.path / "params.yaml"
    path.write_text("# a comment\n" + path.read_text(encoding="utf-8").replace("  lora_alpha: 32", "  lora_alpha:   32 # another"), encoding="utf-8")
    assert built.changed() == {}


def test_a_value_changes_the_stages_that_read_it(built: Clone) -> None:
    for values, expected in VALUES:
        built.set(**values)
        assert built.changed() == {stage: {"params.yaml"} for stage in expected}, values
        built.run("git", "checkout", "--", "params.yaml")


def test_a_comment_in_a_file_changes_the_stages_whose_packages_hold_it(built: Clone) -> None:
    for path in NO_STAGES:
        edit(built, path)
    assert built.changed() == {}
    for path, expected in EDITS.items():
        edit(built, path)
        changed = built.changed()
        assert set(changed) == expected, path
        assert all(is_within(path, sorted(deps)) and len(deps) == 1 for deps in changed.values()), path
        built.run("git", "checkout", "--", path)


def test_nothing_runs_after_a_stage_that_made_the_same_bytes(built: Clone) -> None:
    before = built.outputs()
    edit(built, "qlora/data/cleaning.py")
    edit(built, "qlora/scoring/measures.py")
    assert built.repro() == {"prepare", "evaluate"}
    assert built.outputs() == before


def test_another_test_file_does_not_retrain(built: Clone) -> None:
    rows = tiny_rows("test", 12)[8:]
    (built.path / "data/raw/micro/other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    built.set(data__test_file="data/raw/micro/other.jsonl")
    assert built.repro("prepare") == {"prepare"}
    assert built.changed() == {stage: {"data/prepared/test.jsonl"} for stage in ("baseline", "predict", "evaluate")}


def test_an_edit_of_every_module_changes_all_that_is_listed_and_nothing_else_is_code(built: Clone) -> None:
    modules = {
        str(path.relative_to(built.path))
        for top in ("qlora", "stages", "tools")
        for kind in ("*.py", "*.jinja", "*.css", "*.js")
        for path in (built.path / top).rglob(kind)
    }
    for module in modules:
        edit(built, module)
    assert built.changed() == {stage: set(code_listed(stage)) for stage in STAGES}
    unread = {module for module in modules if not any(is_within(module, code_listed(stage)) for stage in STAGES)}
    assert {module for module in unread if not is_within(module, NOBODYS)} == {"qlora/params/runtime.py"}


def test_a_new_file_in_a_listed_folder_is_a_dependency(built: Clone) -> None:
    for path in ("qlora/scoring/metrics/new.py", "qlora/runtime/new.py"):
        (built.path / path).write_text("", encoding="utf-8")
    assert built.changed() == {"evaluate": {"qlora/scoring"}}


def test_compiled_python_files_are_no_dependency(built: Clone) -> None:
    assert list((built.path / "qlora/scoring/metrics").glob("__pycache__/*.pyc")), "the run left none: the test shows nothing"
    assert not re.search(r"pycache|\.pyc", (built.path / "dvc.lock").read_text(encoding="utf-8"))


def test_test_can_be_carved_out_of_the_train_file(built: Clone) -> None:
    built.set(data__test_file="data/raw/micro/train.jsonl", data__test_fraction=0.2)
    assert built.repro("prepare") == {"prepare"}
    counts: Any = built.json("reports/prepare.json")
    assert sum(counts[split]["rows_in"] for split in ("train", "validation", "test")) == 60
    ids = [
        {json.loads(line)["id"] for line in (built.path / f"data/prepared/{split}.jsonl").read_text(encoding="utf-8").splitlines()}
        for split in ("train", "validation", "test")
    ]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_a_stage_started_from_another_folder_says_so(built: Clone, tmp_path: Path) -> None:
    other = Clone(tmp_path)
    output = other.run("python", "-m", "stages.prepare", "--prepared", "a", "--report", "b", "--notes", "c", fails=True, PYTHONPATH=str(built.path))
    assert "run from the repository's root" in output
