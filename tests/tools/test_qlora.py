"""The command `qlora`, which finds the checkout that one works in, and what it says of tools and params."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.core.errors import InputError
from qlora.params import Params
from tools import __main__ as qlora
from tools import params

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's folder of programs."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (folder / "python").chmod(0o755)
    shutil.copy(ROOT / "tools/qlora.sh", folder / "qlora")
    return folder


def run(bin_folder: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    return subprocess.run(["qlora", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_tool_is_in_the_list_once_with_what_it_does() -> None:
    listed = [tool for tools in qlora.TASKS.values() for tool in tools]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "tools").glob("[a-z]*.py"))
    assert all(len(qlora.summary(tool)) > 20 for tool in listed)


@pytest.mark.parametrize("folder", [".", "docs", "data/raw"])
def test_it_works_in_any_folder_of_a_checkout(bin_folder: Path, folder: str) -> None:
    assert "Begin\n  recipes" in run(bin_folder, ROOT / folder).stdout
    assert run(bin_folder, ROOT / folder, "params", "lr").stdout.startswith("train.learning_rate: ")
    refused = run(bin_folder, ROOT / folder, "recipes", "show", "nowhere")
    assert (refused.returncode, "[recipe-unknown]" in refused.stderr) == (2, True)


def test_it_runs_the_tools_of_the_checkout_that_it_is_called_in(bin_folder: Path, tmp_path: Path) -> None:
    """Environments are shared between checkouts."""
    for name in ("tools", "qlora"):
        shutil.copytree(ROOT / name, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "other/tools/recipes.py"
    path.write_text('"""Other recipes."""\nprint("of the other checkout")\n', encoding="utf-8")
    assert run(bin_folder, tmp_path / "other/qlora/core", "recipes").stdout == "of the other checkout\n"


def test_outside_of_a_checkout_it_says_so(bin_folder: Path, tmp_path: Path) -> None:
    refused = run(bin_folder, tmp_path, "chat")
    assert (refused.returncode, refused.stderr) == (2, f"error: {tmp_path} lies in no checkout of this project: cd to one\n")


def test_a_path_is_that_of_the_folder_it_was_typed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert qlora.from_root("weights", tmp_path / "inside") == "inside/weights"
    assert qlora.from_root("name", tmp_path / "inside") == "name"
    assert qlora.from_root("--path", tmp_path / "inside") == "--path"


def test_an_unknown_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qlora", "nope"])
    with pytest.raises(InputError, match=r"\[tool-unknown\] there is no tool 'nope': recipes, "):
        qlora.main()


def test_make_setup_puts_it_into_the_environment() -> None:
    made = subprocess.run(["make", "--dry-run", "--always-make", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^install -m 755 tools/qlora.sh \S+/bin/qlora$", made, re.MULTILINE)


def test_every_param_is_known_with_what_it_may_be() -> None:
    known = {f"{param.section}.{param.name}": param for param in params.known()}
    assert known.keys() == {f"{name}.{key}" for name, field in Params.model_fields.items() for key in field.annotation.model_fields}
    assert known["lora.r"].allowed == "int (gt=0)"
    assert known["lora.r"].meaning.startswith("Rank of the update.")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("learning_rate", ["train.learning_rate"]),
        ("train.learning_rate", ["train.learning_rate"]),
        ("max_seq_length", ["sequence.max_length"]),
        ("on_too_long", ["sequence.on_too_long", "predict.on_too_long"]),
        ("gradient_accumulation_steps", ["train.batch_size"]),
    ],
)
def test_a_param_is_found_by_its_name_and_by_that_of_other_tools(name: str, found: list[str]) -> None:
    assert [f"{param.section}.{param.name}" for param in params.found(name)] == found


def test_a_name_that_nothing_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[params-unknown\] there is no section or value 'zzzz': `python -m tools.params` lists all"):
        params.found("zzzz")
    with pytest.raises(InputError, match=r"did you mean 'learning_rate'\?"):
        params.found("learning_rat")
