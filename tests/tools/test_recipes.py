import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from qlora import params
from qlora.core.errors import InputError
from qlora.params import Params
from tools import fetch, pin, recipes

PARAMS = Path("params.yaml")


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_composes_to_valid_params_and_keeps_every_comment(name: str) -> None:
    text = recipes.compose(PARAMS, recipes.path_of(name))
    comments = [line.partition("#")[2] for line in PARAMS.read_text(encoding="utf-8").splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in text.splitlines() if "#" in line] == comments


@pytest.mark.parametrize("name", recipes.names())
def test_what_a_recipe_sets_is_what_the_params_say(name: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(recipes.compose(PARAMS, recipes.path_of(name)), encoding="utf-8")
    values = params.load(path).model_dump()
    for section, key, value in recipes.values_of(recipes.path_of(name)):
        assert values[section][key] == value


@pytest.mark.parametrize("name", recipes.names())
def test_the_embedded_default_undoes_every_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(recipes.compose(PARAMS, recipes.path_of(name)), encoding="utf-8")
    path.write_text(recipes.compose(path, recipes.path_of("tiny-cpu")), encoding="utf-8")
    assert params.load(path) == params.load(PARAMS)


def test_the_committed_params_are_the_embedded_default() -> None:
    assert recipes.compose(PARAMS, recipes.path_of("tiny-cpu")) == PARAMS.read_text(encoding="utf-8")
    keys = {(section, key) for section, key, _ in recipes.values_of(recipes.path_of("tiny-cpu"))}
    record = YAML(typ="safe").load(PARAMS)
    assert keys == {(section, key) for section, values in record.items() for key in values if section != "runtime"}


def test_numbers_are_written_as_the_recipe_spells_them() -> None:
    assert "learning_rate: 2e-4" in recipes.compose(PARAMS, recipes.path_of("llama3-8b-rtx4090"))


def test_the_seed_recipe_keeps_its_right_values() -> None:
    record = {(section, key): value for section, key, value in recipes.values_of(recipes.path_of("llama3-8b-rtx4090"))}
    values = Params.model_validate(YAML(typ="safe").load(recipes.compose(PARAMS, recipes.path_of("llama3-8b-rtx4090"))))
    assert (values.lora.r, values.lora.lora_alpha, values.lora.lora_dropout, values.lora.target_modules) == (16, 8, 0.05, "all-linear")
    assert (values.train.learning_rate, values.train.num_train_epochs, values.train.batch_size, values.train.max_grad_norm) == (2e-4, 3, 2, 0.3)
    assert values.gradient_accumulation_steps == 1, "both rows in one pass"
    assert record["sequence", "max_length"] == 3072


@pytest.mark.parametrize(("name", "hint"), [("tiny-cpuu", "did you mean 'tiny-cpu'?"), ("../params", "known: ")])
def test_an_unknown_recipe_is_refused(name: str, hint: str) -> None:
    with pytest.raises(InputError, match="recipe-unknown") as caught:
        recipes.path_of(name)
    assert hint in str(caught.value)


def test_a_recipe_with_an_unknown_key_or_value_is_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("train:\n  learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"\[recipe-key\] .*train\.learning_rat is not a parameter; did you mean 'train\.learning_rate'"):
        recipes.compose(PARAMS, overlay)
    overlay.write_text("predict:\n  batch_size: 16\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"predict\.batch_size is now predict\.batch_tokens, rows x"):
        recipes.compose(PARAMS, overlay)
    overlay.write_text("train:\n  learning_rate: fast\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.learning_rate = 'fast' is not allowed"):
        recipes.compose(PARAMS, overlay)


@pytest.mark.parametrize("action", ["show", "use", "flags"])
def test_an_action_without_a_name_lists_the_names(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes", action])
    with pytest.raises(InputError, match=r"\[recipe-name\] .* needs the name of a recipe: .*tiny-cpu"):
        recipes.main()


def test_flags_quote_what_a_shell_would_split() -> None:
    line = recipes.flags("tiny-cpu")
    assert """-S 'data.system_message="Answer only."'""" in line
    assert "-S train.max_steps=null" in line
    assert "-S hardware.tf32=false" in line


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "tiny-cpu"])
def test_what_a_recipe_needs_is_downloaded_by_a_command_of_the_recipes(name: str) -> None:
    """Doctor prints it where the dataset or the base model is missing."""
    values = {(section, key): value for section, key, value in recipes.values_of(recipes.path_of(name))}
    for key in ("train_file", "test_file"):
        line = recipes.fetch_command(values["data", key])
        assert line is not None
        fetched = fetch.parser().parse_args(shlex.split(line)[3:])
        folder = fetched.name or fetched.repo_id.partition("/")[2]
        assert Path(values["data", key]).is_relative_to(Path("data/raw") / folder)
        assert re.fullmatch("[0-9a-f]{40}", fetched.revision), "the rows of a recipe are those of one commit"
    line = recipes.pin_command(values["base_model", "name"])
    assert line is not None
    pinned = pin.parser().parse_args(shlex.split(line)[3:])
    assert pinned.name == values["base_model", "name"]
    assert pinned.repo_id


def test_of_a_dataset_or_a_model_that_no_recipe_has_nothing_is_said() -> None:
    for path in ("data/raw/mine/train.jsonl", "data/raw", "elsewhere/no_robots/train.parquet", "/data/raw/no_robots/train.parquet"):
        assert recipes.fetch_command(path) is None
    assert recipes.pin_command("mine") is None


def test_no_comment_of_a_recipe_breaks_or_steers_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor prints these commands, to be run."""
    lines = ["pin  ", "pin it's", "fetch a/b --name", "pin evil --repo-id a/b; rm -rf ~"]
    (tmp_path / "x.yaml").write_text("".join(f"#   python -m tools.{line}\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert recipes.fetch_command("data/raw/b/x") is None
    assert recipes.pin_command("evil") == "python -m tools.pin evil --repo-id 'a/b;' rm -rf '~'"


def test_use_says_how_to_download_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(PARAMS, tmp_path / "params.yaml")
    shutil.copytree(PARAMS.absolute().parent / recipes.FOLDER, tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes", "use", "qwen2.5-7b-rtx4090"])
    recipes.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "params.yaml now holds qwen2.5-7b-rtx4090; see `git diff params.yaml`. Download what it needs:"
    assert [line.split()[:3] for line in lines[1:3]] == [["python", "-m", "tools.fetch"], ["python", "-m", "tools.pin"]]
    assert lines[3] == "Then `dvc repro`."
