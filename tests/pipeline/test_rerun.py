"""`tools.verify --rerun`: the proof that the same inputs make the same bytes, and what is named when they don't."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torture import processes
from qlora.delivery.reproduction import PARAMS, Stage, build, changed_inputs, compare, make_clone, stages
from tests.helpers import files_of, flip
from tests.pipeline.clone import Clone

STAGES = ["prepare", "baseline", "train", "predict", "evaluate"]


def test_all_stages_are_built_again_and_every_output_is_the_same(built: Clone, tmp_path: Path) -> None:
    """In a fresh clone at another path, with an empty cache, and a PYTHONHASHSEED of its own beside the random one of the first."""
    before = built.outputs()
    elsewhere = tmp_path / "a-longer-path" / "b"
    elsewhere.mkdir(parents=True)
    output = built.run("python", "-m", "tools.verify", "--rerun", TMPDIR=str(elsewhere), PYTHONHASHSEED="77")
    assert all(f"Running stage '{name}'" in output for name in STAGES)
    assert "5 of 5 stages ran" in output
    record: Any = built.json("reports/reproduction.json")
    assert record["verdict"] == "identical"
    assert record["stages"] == STAGES
    assert len(record["outputs"]) > 12
    assert all(row["identical"] and row["md5"] == row["built_again"] for row in record["outputs"].values())
    assert set(record["environment"]) == set(STAGES)
    assert built.run("git", "status", "--porcelain") == "?? reports/reproduction.json\n", "the clone is another folder"
    assert built.run("dvc", "status") == "Data and pipelines are up to date.\n"
    (built.path / "reports/reproduction.json").unlink()
    assert built.outputs() == before
    # Two stages, by a processor that hides its instruction sets: other last bits, and the reason.
    output = built.run("python", "-m", "tools.verify", "--rerun", "baseline", "evaluate", ATEN_CPU_CAPABILITY="default")
    record = built.json("reports/reproduction.json")
    assert record["stages"] == ["baseline", "evaluate"]
    assert record["verdict"] == "equivalent"
    assert any(cause.startswith("instruction_set was") for cause in record["causes"]["baseline"])
    assert not record["outputs"]["data/predictions/base.jsonl"]["identical"]
    assert record["beyond_tolerance"] == {}
    assert "equivalent on another kind of machine" in output


def test_the_clone_holds_the_working_tree_as_it_is(inside: Clone, tmp_path: Path) -> None:
    """Raw data outside Git, weights behind a link, links, an edit, a deleted file, odd names, a cache elsewhere, a .dvcignore that fits /tmp."""
    inside.run("dvc", "cache", "dir", str(tmp_path / "cache"))
    Path("corpus").mkdir()
    shutil.copy("data/raw/micro/train.jsonl", "corpus/rows.jsonl")
    Path(".git/info/exclude").write_text("corpus\n", encoding="utf-8")
    inside.run("dvc", "add", "--quiet", "corpus")
    shutil.copytree("models/base/tiny", tmp_path / "weights")
    inside.run("python", "-m", "tools.pin", "mine2.5-7b", "--path", str(tmp_path / "weights"))
    shutil.copy("data/raw/micro/test.jsonl", tmp_path / "test.jsonl")
    inside.set(data__train_file="corpus", data__test_file=str(tmp_path / "test.jsonl"), base_model__name="mine2.5-7b")
    with Path(".dvcignore").open("a", encoding="utf-8") as file:
        file.write(f"{tmp_path.parts[1]}/\n")
    inside.repro("prepare", "baseline")
    (tmp_path / "far").mkdir()
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    Path("link").symlink_to(tmp_path / "far", target_is_directory=True)
    Path("replaced").symlink_to(tmp_path / "precious")
    Path(os.fsdecode(b"odd\xff name")).write_bytes(b"")
    inside.commit("links")
    Path("replaced").unlink()
    Path("replaced").write_text("mine now", encoding="utf-8")
    Path("SECURITY.md").unlink()
    Path("README.md").write_text("edited\n", encoding="utf-8")
    chosen = stages(["prepare", "baseline"])
    assert list(changed_inputs(chosen)) == []
    make_clone(tmp_path / "again", chosen)
    copy = Clone(tmp_path / "again")
    assert (copy.path / "link").readlink() == tmp_path / "far"
    assert not (copy.path / "SECURITY.md").exists()
    assert (copy.path / "README.md").read_text(encoding="utf-8") == "edited\n"
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious"
    assert (copy.path / "replaced").read_text(encoding="utf-8") == "mine now"
    assert (copy.path / "models/base/mine2.5-7b").resolve() == (tmp_path / "weights").resolve()
    assert copy.run("dvc", "cache", "dir").strip() == str(tmp_path / "again" / ".dvc" / "cache")
    assert build(copy.path, chosen, everything=False) == ["prepare", "baseline"]
    record = compare(copy.path, chosen, ["prepare", "baseline"], "of the lock")
    assert record["verdict"] == "identical"
    assert record["dvc_lock_sha256"] == "of the lock"


def test_only_what_a_model_computed_on_another_machine_may_differ(inside: Clone, tmp_path: Path) -> None:
    """Two folders alike but for what each case changes, in place of a second machine."""

    def verdict(names: list[str], changes: dict[str, str | None], cpu_of: tuple[str, ...]) -> str:
        folder = tmp_path / "again"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inside.path, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", "cache"))
        noted = inside.json("metrics/environment.json")
        changed = {name: {**row, "cpu": "other"} if name in cpu_of else row for name, row in noted.items()}
        (folder / "metrics/environment.json").write_text(json.dumps(changed), encoding="utf-8")
        for name, text in changes.items():
            (folder / name).unlink()
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        return str(compare(folder, stages(names), names or [stage.name for stage in stages()], "")["verdict"])

    evaluation: Any = inside.json("reports/evaluation.json")

    def scores(side: str, factor: float) -> dict[str, str]:
        return {"reports/evaluation.json": json.dumps({**evaluation, side: {**evaluation[side], "nll": evaluation[side]["nll"] * factor}})}

    base, tuned = {"data/predictions/base.jsonl": "other"}, {"data/predictions/tuned.jsonl": "other"}
    assert verdict([], {}, ()) == "identical"
    assert verdict([], {**tuned, **scores("tuned", 1.001)}, ("predict",)) == "equivalent"
    assert verdict([], {**tuned, **scores("tuned", 1.001)}, ("train",)) == "equivalent", "the adapter came from another machine"
    assert verdict([], {**base, **scores("base", 1.001)}, ("baseline",)) == "equivalent"
    assert verdict([], {**tuned, **scores("tuned", 1.1)}, ("predict",)) == "different"
    assert verdict([], {**base, **scores("base", 1.1)}, ("baseline",)) == "different"
    assert verdict([], {**tuned, **scores("tuned", 1.001)}, ()) == "different", "nothing explains it"
    assert verdict([], scores("tuned", 1.001), ("evaluate",)) == "different", "no model computes it, and what it read is the same"
    assert verdict([], base, ("predict",)) == "different", "what explains it came later"
    assert verdict([], {"data/prepared/train.jsonl": "wrong"}, ("prepare", "train")) == "different", "no model computes it"
    assert verdict([], {"data/predictions/tuned.jsonl": None}, ("predict",)) == "different", "it was not made"
    adapter: dict[str, str | None] = {"models/adapter/adapter_model.safetensors": "other"}
    assert verdict(["train"], adapter, ("train",)) == "not judged"
    assert verdict(["train", "evaluate"], adapter, ("train",)) == "not judged", "the answers that were scored are those of the old adapter"
    assert verdict(["train", "predict", "evaluate"], {**adapter, **tuned, **scores("tuned", 1.001)}, ("train",)) == "equivalent"


def test_a_signal_ends_dvc_and_its_stage_before_the_clone_is_removed(built: Clone, tmp_path: Path) -> None:
    environment = {**built.environment, "TMPDIR": str(tmp_path)}
    log = (tmp_path / "log").open("wb")
    program = subprocess.Popen(["python", "-m", "tools.verify", "--rerun", "baseline"], cwd=built.path, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not processes(tmp_path, "-m stages.predict") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(tmp_path, "-m stages.predict")
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 75
    assert processes(tmp_path, "stages.") == []
    assert list(tmp_path.glob("reproduction-*")) == []
    log.close()


def test_other_outputs_from_the_same_inputs_are_an_error(built: Clone) -> None:
    lock = built.path / "dvc.lock"
    md5 = next(entry.md5 for entry in _stage(built, "prepare").entries if entry.path == "data/prepared/test.jsonl")
    lock.write_text(lock.read_text(encoding="utf-8").replace(md5, "ab" * 16), encoding="utf-8")
    output = built.run("sh", "-c", "python -m tools.verify --rerun prepare; echo status $?")
    assert "[reproduction-differs] the same inputs gave other outputs, and the environment is the same" in output
    assert f"data/prepared/test.jsonl: {md5}, dvc.lock says {'ab' * 16}" in output
    assert "status 2" in output
    assert built.json("reports/reproduction.json")["verdict"] == "different"


def _stage(clone: Clone, name: str) -> Stage:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone.path)
        return stages([name])[0]


def test_one_changed_byte_in_any_input_or_module_is_named(inside: Clone) -> None:
    chosen = stages()
    assert list(changed_inputs(chosen)) == []
    made = {entry.path for stage in chosen for entry in stage.entries if entry.is_output}
    read = {entry.path for stage in chosen for entry in stage.entries if not entry.is_output} - made
    tried = 0
    for path in sorted(read):
        for file in files_of(Path(path)):
            if file.name == "params.yaml" or "__pycache__" in file.parts:
                continue
            content = file.read_bytes()
            flip(file)
            # A manifest that is no JSON any more is its own cause.
            assert any(cause.startswith((f"{path}: ", "the base model", str(path))) for cause in changed_inputs(chosen)), file
            file.write_bytes(content)
            tried += 1
    assert tried > 60
    for file in Path("models/base/tiny").glob("*.json"):
        content = file.read_bytes()
        flip(file)
        assert any(file.name in cause for cause in changed_inputs(chosen)), file
        file.write_bytes(content)
    assert list(changed_inputs(chosen)) == []
    # One stage alone reads what the one before it made.
    flip(Path("data/prepared/train.jsonl"))
    assert any(cause.startswith("data/prepared/train.jsonl: ") for cause in changed_inputs(stages(["train"])))
    assert list(changed_inputs(stages())) == []


def test_every_changed_param_and_command_is_named(inside: Clone) -> None:
    tried = 0
    for stage in stages():
        for section, values in stage.locked["params"][str(PARAMS)].items():
            for key in values if isinstance(values, dict) else [None]:
                locked = copy.deepcopy(stage.locked)
                if key is None:
                    locked["params"][str(PARAMS)][section] = "other"
                else:
                    locked["params"][str(PARAMS)][section][key] = "other"
                place = section if key is None else f"{section}.{key}"
                (cause,) = changed_inputs([dataclasses.replace(stage, locked=locked)])
                assert cause.startswith(f"params.yaml: {place} is "), place
                tried += 1
        (cause,) = changed_inputs([dataclasses.replace(stage, command="exec python -m stages.other")])
        assert "the command of" in cause
        for kind, name in (("dependencies", "qlora/new.py"), ("outputs", "data/new.jsonl"), ("params", "runtime")):
            (cause,) = changed_inputs([dataclasses.replace(stage, **{kind: getattr(stage, kind) | {name}})])
            assert cause.startswith(f"{name}: a"), cause
            assert f" of {stage.name} in dvc.yaml alone" in cause
    assert tried > 100


def test_what_can_not_be_built_again_is_one_message(built: Clone) -> None:
    assert "[verify-stage] 'trian' is not a stage" in built.run("python", "-m", "tools.verify", "--rerun", "trian", fails=True)
    built.set(train__seed=5)
    output = built.run("sh", "-c", "python -m tools.verify --rerun; echo status $?")
    assert "[reproduction-inputs]" in output
    assert "params.yaml: train.seed is 5, dvc.lock says 42 (train)" in output
    assert "status 2" in output
    assert built.json("reports/reproduction.json") == {
        "verdict": "inputs changed",
        "causes": ["params.yaml: train.seed is 5, dvc.lock says 42 (train)"],
    }
    built.run("git", "checkout", "--", "params.yaml")
    # What breaks a stage and is no input of any: a package before those of the environment.
    output = built.run("sh", "-c", "python -m tools.verify --rerun prepare; echo status $?", PYTHONPATH=str(_broken(built)))
    assert "[reproduction-failed]" in output
    assert "status 2" in output


def _broken(clone: Clone) -> Path:
    """A folder in which a package that `prepare` needs, and this tool does not, ends every program that imports it."""
    folder = clone.path.parent / "broken" / "pyarrow"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit(9)\n", encoding="utf-8")
    return folder.parent
