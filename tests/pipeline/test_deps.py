"""dvc.yaml lists exactly the code that each stage runs and the params that it reads."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from qlora.params import Params

ROOT = Path(__file__).parents[2]
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
FOLDERS = ("qlora/formats", "qlora/scoring", "qlora/chat_templates", "qlora/report")
"""Listed as folders, so that a new file in one of them is a dependency too."""


def imported(path: Path) -> set[Path]:
    """Files of this project that a module imports, wherever in the file, packages' __init__ included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files: set[Path] = set()
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            place = ROOT.joinpath(*parts[:end])
            files |= {candidate for candidate in (place.with_suffix(".py"), place / "__init__.py") if candidate.is_file()}
    return files


def closure(stage: str) -> set[str]:
    """Paths of all code that `python -m stages.STAGE` runs, itself included."""
    todo, seen = [ROOT / "stages" / "__init__.py", ROOT / "stages" / f"{stage}.py"], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path)
    return {str(path.relative_to(ROOT)) for path in seen}


def sections(stage: str) -> set[str]:
    return {entry.partition(".")[0] for entry in STAGES[stage]["params"]}


def expected_code(stage: str) -> set[str]:
    """The closure, folders for their files, without the schemas of sections that the stage only checks.

    Every stage checks all of params.yaml, so a foreign schema can make it refuse a run but never change what it makes.
    """
    foreign = {f"qlora/params/{name}.py" for name in Params.model_fields if name not in sections(stage)}
    code = closure(stage) - foreign
    if "qlora/chat_template.py" in code:
        code.add("qlora/chat_templates")  # read, not imported
    return {next((folder for folder in FOLDERS if path.startswith(folder + "/")), path) for path in code}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_exactly_the_imported_code(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith(("qlora/", "stages/"))}
    assert listed == expected_code(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_depends_on_a_tool_and_every_stage_on_the_requirements(stage: str) -> None:
    assert not any(path.startswith("tools/") for path in closure(stage))
    assert "requirements.txt" in STAGES[stage]["deps"]


def test_prepare_never_imports_torch() -> None:
    import subprocess
    import sys

    code = "import sys, stages.prepare; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_the_package_that_fetches_native_code(stage: str, tmp_path: Path) -> None:
    """bitsandbytes would, on some CPUs, at import; a stand-in on the path notes whether it was asked."""
    import os
    import subprocess
    import sys

    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'asked')!r}, 'w')\nraise ImportError", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", f"stages.{stage}", "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "reads" in done.stdout
    assert "Failed to load" not in done.stderr
    assert not (tmp_path / "asked").exists()


def sections_read(path: Path) -> set[str]:
    """Sections that a module reads as `values.SECTION` or `params.SECTION`, or by their schema's type."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"\b(?:values|params)\.([a-z_]+)\b", text)) & set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_exactly_the_sections_that_the_stage_reads(stage: str) -> None:
    files = [ROOT / path for path in closure(stage) if not path.startswith("qlora/params/")]
    read: set[str] = set().union(*(sections_read(path) for path in files)) - {"runtime"}
    own_schemas = {path.stem for path in map(Path, closure(stage)) if str(path.parent) == "qlora/params"} & {
        Path(name).stem for path in files for name in re.findall(r"from qlora\.params\.(\w+) import", path.read_text(encoding="utf-8"))
    }
    assert sections(stage) == (read | own_schemas) - {"runtime"}


def test_no_stage_lists_runtime() -> None:
    assert all("runtime" not in sections(stage) for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_commands_are_constant_and_replace_their_shell(stage: str) -> None:
    command = STAGES[stage]["cmd"]
    assert "${" not in command
    assert command.startswith(f"exec python -m stages.{stage} ")


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_named_in_the_command(stage: str) -> None:
    outs = [out if isinstance(out, str) else next(iter(out)) for kind in ("outs", "metrics", "plots") for out in STAGES[stage].get(kind, [])]
    command = STAGES[stage]["cmd"].split()
    assert all(any(out == word or out.startswith(word + "/") for word in command) for out in outs)
    assert STAGES[stage]["outs"], "a stage whose outs are all in Git is skipped by a fresh clone"


def test_there_is_one_dvc_yaml() -> None:
    found = [path for path in ROOT.rglob("dvc.yaml") if ".dvc" not in path.parts and ".venv" not in path.parts]
    assert found == [ROOT / "dvc.yaml"]


def test_every_plot_names_two_columns_of_its_file() -> None:
    """Without `x`, dvc draws over the number of the row and calls it by the name of a column."""
    plots = {path: drawn for stage in STAGES.values() for plot in stage.get("plots", []) for path, drawn in plot.items()}
    assert len(plots) >= 3
    for path, drawn in plots.items():
        header = (ROOT / path).read_text(encoding="utf-8").splitlines()[0].split(",")
        assert {drawn["x"], drawn["y"]} <= set(header), path
        assert drawn["title"]
