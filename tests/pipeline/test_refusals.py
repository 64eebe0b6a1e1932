"""A refused value costs nothing: it is found before DVC removes an output, or the message holds the commands that restore all."""

import re
import shutil
from pathlib import Path

import pytest

from tests.pipeline.clone import Clone, ran

REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "a format that the rows don't have": ("prepare", {"data__format": "alpaca"}, "data-columns"),
    "a GPU that is not there": ("baseline", {"hardware__device": "cuda"}, "no-gpu"),
    "rows longer than the context": ("train", {"sequence__max_length": 513}, "sequence-context"),
    "layers that the model has not": ("train", {"lora__target_modules": ["nowhere"]}, "lora-layers"),
}


def commands_of(output: str) -> list[str]:
    """Those that the message ends with."""
    _, _, listed = output.partition("This restores them:\n")
    return [line.strip() for line in re.match(r"(?:  .+\n)*", listed)[0].splitlines()]


def state(clone: Clone) -> dict[str, bytes]:
    return {**clone.outputs(), **{name: (clone.path / name).read_bytes() for name in ("params.yaml", "dvc.lock", "dvc.yaml")}}


@pytest.mark.parametrize("name", REFUSED)
def test_the_commands_of_a_refusal_restore_every_byte(built: Clone, name: str) -> None:
    stage, values, code = REFUSED[name]
    before = state(built)
    built.set(**values)
    output = built.run("dvc", "repro", stage, fails=True)
    assert f"[{code}]" in output
    assert state(built).keys() < before.keys(), "DVC removes a stage's outputs before it begins"
    commands = commands_of(output)
    assert [command.split()[0:2] for command in commands][:2] == [["git", "stash"], ["dvc", "checkout"]], output
    for command in commands:
        built.run("bash", "-c", command)
    assert state(built) == before
    assert built.repro() == set()
    assert built.run("git", "stash", "list").count("\n") == 1, "what was set is kept"


def test_results_that_were_never_committed_come_back_too(built: Clone) -> None:
    built.set(evaluate__resamples=1001)
    assert built.repro() == {"evaluate"}
    before = state(built)
    params = before["params.yaml"].decode()
    (built.path / "params.yaml").write_text(params.replace("resamples: 1001", "resamples: -1"), encoding="utf-8")
    output = built.run("dvc", "repro", fails=True)
    value, *commands = commands_of(output)
    assert value == "in params.yaml: evaluate.resamples: 1001"
    assert commands[-1].startswith("dvc repro evaluate   # ")
    (built.path / "params.yaml").write_text(params, encoding="utf-8")
    for command in commands:
        built.run("bash", "-c", command)
    assert state(built) == before


def test_a_stage_of_one_s_own_does_not_keep_the_others_from_running(built: Clone) -> None:
    """In the forms that dvc.yaml allows."""
    own = """
  mine:
    cmd: [echo a, echo b]
    params:
      - other.yaml:
          - x
  each:
    foreach: [1, 2]
    do:
      cmd: echo ${item}
"""
    path = built.path / "dvc.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("\nstages:\n", f"\nstages:{own}", 1), encoding="utf-8")
    (built.path / "other.yaml").write_text("x: 1\n", encoding="utf-8")
    built.set(evaluate__resamples=1001)
    assert "evaluate" in built.repro()
    built.run("python", "-m", "tools.check")


def test_so_do_those_of_an_experiment(built: Clone) -> None:
    before = state(built)
    output = built.run("dvc", "exp", "run", "-S", "evaluate.resamples=-1", fails=True)
    assert "evaluate.resamples = -1 is not allowed" in output
    for command in commands_of(output):
        built.run("bash", "-c", command)
    assert state(built) == before


def test_a_copy_of_the_workspace_loses_nothing_and_names_no_command(built: Clone) -> None:
    before = state(built)
    output = built.run("dvc", "exp", "run", "--temp", "-S", "evaluate.resamples=-1", fails=True)
    assert "evaluate.resamples = -1 is not allowed" in output
    assert "restores" not in output
    assert state(built) == before


CHECKED: dict[str, tuple[str, str]] = {
    "a wrong value": ("train.learning_rate=-1", "train.learning_rate = -1 is not allowed"),
    "a rule over two sections": ("train.batch_size=3,hardware.per_device_train_batch_size=2", "is not a multiple"),
    "data that are not there": ("data.train_file=data/raw/nowhere.jsonl", "[data-missing] data/raw/nowhere.jsonl"),
    "a model that is not pinned": ("base_model.name=nowhere", "[base-model-unpinned]"),
    "a GPU that is not there": ("hardware.device=cuda", "[no-gpu]"),
    "a name that DVC does not know": ("train.lr=1", "[check-value]"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_check_finds_it_and_nothing_is_removed(built: Clone, name: str) -> None:
    setting, shown = CHECKED[name]
    before = state(built)
    arguments = [part for value in re.split(r",(?=\w+\.)", setting) for part in ("-S", value)]
    output = built.run("python", "-m", "tools.check", "--queue", "--name", "mine", *arguments, fails=True)
    assert shown in output
    assert "Traceback" not in output
    assert state(built) == before


def test_check_looks_at_every_value_of_several_and_passes_good_ones(built: Clone) -> None:
    assert built.run("python", "-m", "tools.check", "-S", "train.learning_rate=1e-5,2e-5").startswith("checked: ")
    assert "learning_rate = -1 is not allowed" in built.run("python", "-m", "tools.check", "-S", "train.learning_rate=1e-5,-1", fails=True)
    assert built.run("python", "-m", "tools.check").startswith("checked: ")


def test_check_names_every_problem_at_once(built: Clone) -> None:
    built.set(data__train_file="data/raw/nowhere.jsonl", base_model__name="nowhere")
    output = built.run("python", "-m", "tools.check", fails=True)
    assert "[data-missing]" in output
    assert "[base-model-unpinned]" in output


def test_check_passes_over_what_no_stage_that_runs_would_need(built: Clone) -> None:
    """Scoring needs no weights, no GPU and no raw data."""
    shutil.move(built.path / "models/base/tiny", built.path.parent / "weights")
    assert built.run("python", "-m", "tools.check").startswith("checked: ")
    assert built.run("python", "-m", "tools.check", "-S", "evaluate.resamples=1001").startswith("checked: ")
    for setting in ("predict.max_new_tokens=2", "train.seed=2", "hardware.device=cuda"):
        assert "[base-model-missing]" in built.run("python", "-m", "tools.check", "-S", setting, fails=True)


def test_check_says_that_dvc_can_not_be_asked(built: Clone) -> None:
    built.set(data__train_file="data/raw/nowhere.jsonl")
    (built.path / "dvc.yaml").write_text("stages: [\n", encoding="utf-8")
    assert "[check-status] `dvc status` fails: " in built.run("python", "-m", "tools.check", fails=True)


def test_check_knows_that_a_copy_of_the_workspace_takes_data_from_the_cache(built: Clone) -> None:
    path = built.path / "data/raw/micro/mine.jsonl"
    shutil.copy(path.with_name("train.jsonl"), path)
    built.run("dvc", "add", "--quiet", "data/raw/micro/mine.jsonl")
    built.set(data__train_file="data/raw/micro/mine.jsonl")
    path.unlink()
    assert "[data-missing]" in built.run("python", "-m", "tools.check", fails=True)
    assert built.run("python", "-m", "tools.check", "--temp").startswith("checked: ")


def test_make_repro_and_the_function_of_the_docs_look_first(built: Clone) -> None:
    # Make itself says in which folder it works, where another make runs these tests.
    planned = [line for line in built.run("make", "--dry-run", "repro").splitlines() if not line.startswith("make")]
    assert planned[-2:] == ["python -m tools.check", "dvc repro"]
    (function,) = re.findall(r"^    (exp\(\) \{.+\})$", (built.path / "docs/experiments.md").read_text(encoding="utf-8"), re.MULTILINE)
    before = state(built)
    output = built.run("bash", "-c", f"{function}\nexp -S evaluate.resamples=-1", fails=True)
    assert "evaluate.resamples = -1 is not allowed" in output
    assert state(built) == before
    assert ran(built.run("bash", "-c", f"{function}\nexp -S evaluate.resamples=1001")) == {"evaluate"}


def test_a_tool_in_another_folder_says_where_the_root_is(built: Clone) -> None:
    environment = {"PYTHONPATH": str(built.path)}
    (built.path / "elsewhere").mkdir()
    elsewhere = Clone(built.path / "elsewhere", {**built.environment, **environment})
    for tool in ("check", "verify", "recipes show tiny-cpu", "doctor"):
        output = elsewhere.run("python", "-m", *f"tools.{tool}".split(), fails=True)
        assert f"cd {Path(built.path)}" in output, output


def test_check_says_what_downloads_the_data_and_the_model_of_a_recipe(built: Clone) -> None:
    built.run("python", "-m", "tools.recipes", "use", "qwen2.5-7b-rtx4090")
    output = built.run("python", "-m", "tools.check", fails=True)
    _, _, listed = output.partition("What downloads it:\n")
    assert [line.split()[2] for line in listed.splitlines()] == ["tools.fetch", "tools.pin"]
