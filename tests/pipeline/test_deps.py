"""dvc.yaml lists the code that each stage runs, by packages, and the params that it reads: nothing is missing, nothing is listed in vain."""

import ast
import json
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from qlora.params import Params
from tests.pipeline.wiring import NOBODYS, ROOT, STAGES, code_listed, is_within, outputs

PROGRAMS = {stage: "predict" if stage == "baseline" else stage for stage in STAGES}
"""The module of stages/ that a stage runs."""
MOST_DEPS = 20
MOST_LINES = 190


def imported(path: str) -> set[str]:
    """Files of this project that a module imports, wherever in the file, packages' __init__ included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files: set[str] = set()
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            place = Path(*parts[:end])
            files |= {str(candidate) for candidate in (place.with_suffix(".py"), place / "__init__.py") if (ROOT / candidate).is_file()}
    return files


def closure(stage: str) -> set[str]:
    """Paths of the code that the stage runs, its own module included; imports of qlora/runtime are not followed.

    Every stage checks all of params.yaml. The schema of a section that it does not read can make it refuse a run but never change what it
    makes, so that is left out.
    """
    todo, seen = {"stages/__init__.py", f"stages/{PROGRAMS[stage]}.py"}, set()
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= {name for name in imported(path) if not is_within(name, NOBODYS[:1])} - seen
    foreign = {f"qlora/params/{name}.py" for name in Params.model_fields if name not in sections(stage)}
    return seen - foreign


ONE_VALUE = "data.on_invalid"
"""Of a section that is prepare's: its schema is prepare's code, and the value itself is tracked."""


def sections(stage: str) -> set[str]:
    """Sections whose schema the stage depends on."""
    return {entry.partition(".")[0] for entry in STAGES[stage]["params"] if entry != ONE_VALUE}


@pytest.mark.parametrize("stage", STAGES)
def test_all_code_that_a_stage_imports_is_listed(stage: str) -> None:
    assert len(closure(stage)) > 10
    assert {path for path in closure(stage) if not is_within(path, code_listed(stage))} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_all_code_that_a_stage_lists_is_there_and_imported(stage: str) -> None:
    for place in code_listed(stage):
        assert (ROOT / place).exists(), place
        # Beyond its __init__, which every import of it takes along.
        assert any(is_within(path, [place]) and path != f"{place}/__init__.py" for path in closure(stage)), place
    assert len(set(code_listed(stage))) == len(code_listed(stage))


def test_every_module_of_a_listed_folder_is_imported_by_a_stage_that_lists_it() -> None:
    folders = {place for stage in STAGES for place in code_listed(stage) if (ROOT / place).is_dir()}
    assert folders == {"qlora/core", "qlora/data", "qlora/model", "qlora/prediction", "qlora/scoring", "qlora/training"}
    for folder in folders:
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        by_stages = set().union(*(closure(stage) for stage in STAGES if folder in code_listed(stage)))
        assert modules <= by_stages, folder


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_lists_what_can_change_no_output(stage: str) -> None:
    assert not [place for place in code_listed(stage) if any(is_within(place, [other]) or is_within(other, [place]) for other in NOBODYS)]
    assert not [path for path in closure(stage) if is_within(path, NOBODYS)]
    assert "qlora/params/runtime.py" not in code_listed(stage)
    assert "runtime" not in sections(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_schemas_listed_are_those_of_the_sections_that_the_stage_reads(stage: str) -> None:
    listed = {place for place in code_listed(stage) if is_within(place, ["qlora/params"])}
    assert listed == {f"qlora/params/{name}.py" for name in ("__init__", "section", *sections(stage))}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_depends_on_the_requirements_and_none_has_more_than_a_reader_can_hold(stage: str) -> None:
    assert "requirements.txt" in STAGES[stage]["deps"]
    assert len(STAGES[stage]["deps"]) <= MOST_DEPS


def test_the_graph_fits_a_few_screens() -> None:
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_packages_import_each_other_in_one_direction() -> None:
    """A package is a folder of qlora/; imports for the type checker alone count."""
    graph: dict[str, set[str]] = {}
    for path in (str(path.relative_to(ROOT)) for path in (ROOT / "qlora").glob("*/**/*.py")):
        own = path.split("/")[1]
        packages = {name.split("/")[1] for name in imported(path) if name.startswith("qlora/") and name.count("/") > 1}
        graph[own] = graph.get(own, set()) | (packages - {own})
    assert len(graph) > 8
    # Raises CycleError.
    order = list(TopologicalSorter(graph).static_order())
    assert order[0] == "core"
    assert graph["core"] == set()


@pytest.mark.parametrize("stage", ["prepare", "evaluate"])
def test_a_stage_without_a_model_imports_none_of_its_libraries(stage: str) -> None:
    code = f"import sys, stages.{stage}; print({{'torch', 'transformers', 'peft', 'trl', 'datasets'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("program", sorted(set(PROGRAMS.values())))
def test_no_stage_imports_the_package_that_fetches_native_code(program: str, tmp_path: Path) -> None:
    """bitsandbytes would, on some CPUs, at import; a stand-in on the path notes whether it was asked."""
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'asked')!r}, 'w')\nraise ImportError", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", f"stages.{program}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "reads" in done.stdout
    assert "Failed to load" not in done.stderr
    assert not (tmp_path / "asked").exists()


def sections_read(path: Path) -> set[str]:
    """Sections that a module reads as `values.SECTION` or `params.SECTION`."""
    text = path.read_text(encoding="utf-8").replace(f"values.{ONE_VALUE}", "")
    return set(re.findall(r"\b(?:values|params)\.([a-z_]+)\b", text)) & set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_the_sections_that_the_stage_reads(stage: str) -> None:
    files = [ROOT / path for path in closure(stage) if not path.startswith("qlora/params/")]
    read: set[str] = set().union(*(sections_read(path) for path in files))
    by_schema = {name for path in files for name in re.findall(r"from qlora\.params\.(\w+) import", path.read_text(encoding="utf-8"))}
    assert sections(stage) == (read | by_schema & set(Params.model_fields)) - {"runtime"}
    reads_one = any(f"values.{ONE_VALUE}" in path.read_text(encoding="utf-8") for path in files)
    assert (ONE_VALUE in STAGES[stage]["params"]) == reads_one


def test_baseline_and_predict_run_the_same_program_with_the_same_params_and_code() -> None:
    baseline, predict = STAGES["baseline"], STAGES["predict"]
    assert baseline["params"] == predict["params"]
    assert code_listed("baseline") == code_listed("predict")
    assert set(predict["deps"]) - set(baseline["deps"]) == {"models/adapter"}
    assert predict["cmd"].replace("tuned", "base") == baseline["cmd"] + " --adapter-folder models/adapter"


@pytest.mark.parametrize("stage", STAGES)
def test_commands_are_constant_and_replace_their_shell(stage: str) -> None:
    command = STAGES[stage]["cmd"]
    assert "${" not in command
    assert command.startswith(f"exec python -m stages.{PROGRAMS[stage]} ")


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_named_in_the_command(stage: str) -> None:
    words = STAGES[stage]["cmd"].split()
    beside = {f"{word.removesuffix('.jsonl')}{suffix}" for word in words for suffix in ("_batches.jsonl", "_counts.json") if word.endswith(".jsonl")}
    assert all(out in beside or any(is_within(out, [word]) for word in words) for out in outputs(stage))
    cached = [out for out in STAGES[stage]["outs"] if isinstance(out, str)]
    assert cached, "a stage whose outs are all in Git is skipped by a fresh clone"


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_the_command_names_is_a_dependency_or_an_output(stage: str) -> None:
    known = [re.sub(r"\$\{[^}]+\}", "NAME", dep) for dep in STAGES[stage]["deps"]] + outputs(stage)
    files = [word for word in STAGES[stage]["cmd"].split() if "/" in word]
    assert len(files) > 1
    for file in files:
        assert any(is_within(place, [file]) for place in known), file


def test_there_is_one_dvc_yaml() -> None:
    found = [path for path in ROOT.rglob("dvc.yaml") if ".dvc" not in path.parts and ".venv" not in path.parts]
    assert found == [ROOT / "dvc.yaml"]


def test_the_one_metric_file_is_that_of_evaluate() -> None:
    assert {path for stage in STAGES.values() for metric in stage.get("metrics", []) for path in metric} == {"metrics/evaluate.json"}


def fields(path: Path) -> set[str]:
    """What each drawn row of a plot's file has: the columns of a .csv, the keys in the list `plot` of a .json."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return set(text.splitlines()[0].split(","))
    lists = [value for value in json.loads(text).values() if isinstance(value, list)]
    assert len(lists) == 1, f"{path}: dvc draws every list that it finds"
    return set.intersection(*(set(row) for row in lists[0]))


def test_every_plot_names_two_fields_of_its_file() -> None:
    """Without `x`, dvc draws over the number of the row and calls it by the name of a column."""
    plots = {path: drawn for stage in STAGES.values() for plot in stage.get("plots", []) for path, drawn in plot.items()}
    assert len(plots) >= 3
    for path, drawn in plots.items():
        assert {drawn["x"], drawn["y"]} <= fields(ROOT / path), path
        assert drawn["title"]
