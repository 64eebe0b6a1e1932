"""A training that is stopped or killed under the real dvc resumes to the same bytes, and nothing outlives the dvc that started it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks.torture import processes
from qlora.runtime.signals import SIGNALS, Interruption
from tests.helpers import once
from tests.pipeline.clone import Clone, ran
from tests.pipeline.interrupting import checkpoint, log, ranks, started, wait_for


@pytest.fixture(scope="module")
def expected(before_training: Clone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a training makes that nothing stops."""

    def train(path: Path) -> None:
        shutil.copytree(before_training.path, path, symlinks=True)
        assert Clone(path).repro("train") == {"train"}

    return Clone(once(tmp_path_factory, "whole", train)).outputs()


@pytest.fixture
def clone(before_training: Clone, tmp_path: Path) -> Clone:
    shutil.copytree(before_training.path, tmp_path / "clone", symlinks=True)
    return Clone(tmp_path / "clone")


def files_with_a_token(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def catches(process: int, number: int) -> bool:
    """Whether it has a handler of its own for the signal."""
    mask = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return bool(mask and int(mask[1], 16) >> (number - 1) & 1)


# In parts, so that this file, which the clone holds, is not taken for a leak.
SECRET = "-".join(("s3cr3t", "0123456789", "t0k3n"))
TOKENS = dict.fromkeys(
    (
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_TOKEN", "NEPTUNE_API_TOKEN"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "GITHUB_TOKEN", "DVC_STUDIO_TOKEN", "OPENAI_API_KEY"),
    ),
    SECRET,
)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_training_with_a_checkpoint_and_a_rerun_goes_on(clone: Clone, expected: dict[str, bytes], name: str) -> None:
    dvc = started(clone, "dvc", "repro", "train", **TOKENS)
    wait_for(lambda: checkpoint(clone))
    (trainer,) = processes(clone.path, "-m stages.train")
    os.kill(trainer, getattr(signal, name))
    assert dvc.wait(60) != 0
    assert f"[stopped] {name} at step" in log(clone)
    assert "Traceback" not in log(clone)
    assert "exited with 75" in log(clone)
    assert checkpoint(clone)
    assert files_with_a_token(clone.path) == []
    assert ran(again := clone.run("dvc", "repro", "train", **TOKENS)) == {"train"}
    assert SECRET not in log(clone) + again
    assert "resuming from checkpoint" in again
    assert clone.outputs() == expected
    assert files_with_a_token(clone.path) == []


@pytest.mark.parametrize("shell", ["/bin/sh", None])
def test_no_trainer_goes_on_without_its_dvc(clone: Clone, expected: dict[str, bytes], shell: str | None) -> None:
    dvc = started(clone, "dvc", "repro", "train", SHELL=shell)
    wait_for(lambda: checkpoint(clone))
    dvc.kill()
    dvc.wait()
    # A second one begins at once and waits for the first to end.
    assert ran(clone.run("dvc", "repro", "train")) == {"train"}
    assert processes(clone.path) == []
    assert clone.outputs() == expected


def test_a_killed_trainer_goes_on_from_its_last_checkpoint(clone: Clone, expected: dict[str, bytes]) -> None:
    dvc = started(clone, "dvc", "repro", "train")
    wait_for(lambda: checkpoint(clone))
    (trainer,) = processes(clone.path, "-m stages.train")
    os.kill(trainer, signal.SIGKILL)
    assert dvc.wait(60) != 0
    assert "resuming from checkpoint" in clone.run("dvc", "repro", "train")
    assert clone.outputs() == expected


def test_two_at_once_make_one_result(clone: Clone, expected: dict[str, bytes]) -> None:
    both = [started(clone, "dvc", "repro", "train") for _ in range(2)]
    statuses = [dvc.wait(200) for dvc in both]
    assert 0 in statuses
    if any(statuses):
        assert any(words in log(clone) for words in ("is busy", "Unable to acquire lock", "is training in"))
    clone.repro("train")
    assert clone.outputs() == expected


def test_edits_outside_the_training_leave_its_checkpoint_in_use(clone: Clone, expected: dict[str, bytes]) -> None:
    dvc = started(clone, "dvc", "repro", "train")
    wait_for(lambda: checkpoint(clone))
    dvc.kill()
    dvc.wait()
    wait_for(lambda: not processes(clone.path), 60)
    for name in ("qlora/scoring/report/__init__.py", "qlora/delivery/hub.py", "qlora/runtime/locks.py", "stages/evaluate.py", "tools/compare.py"):
        with (clone.path / name).open("a", encoding="utf-8") as file:
            file.write("# edited\n")
    assert "resuming from checkpoint" in clone.run("dvc", "repro", "train")
    assert clone.outputs() == expected


@pytest.mark.parametrize("victim", ["the first rank", "the stage, by SIGTERM"])
def test_a_training_by_two_processes_goes_on(of_two_processes: tuple[Clone, dict[str, bytes]], tmp_path: Path, victim: str) -> None:
    before, expected = of_two_processes
    shutil.copytree(before.path, tmp_path / "clone", symlinks=True)
    clone = Clone(tmp_path / "clone")
    dvc = started(clone, "dvc", "repro", "train")
    wait_for(lambda: checkpoint(clone))
    first, second = ranks(clone.path, "-m stages.train")
    (launcher,) = {*processes(clone.path, "-m stages.train")} - {first, second}
    os.kill(*((first, signal.SIGKILL) if victim == "the first rank" else (launcher, signal.SIGTERM)))
    assert dvc.wait(60) != 0
    wait_for(lambda: not processes(clone.path), 60)
    if victim == "the first rank":
        assert "[rank-died] process 0 of 2 was ended by SIGKILL" in log(clone)
    else:
        assert log(clone).count("[stopped] SIGTERM at step") == 1
        assert "exited with 75" in log(clone)
    assert "Traceback" not in log(clone)
    assert "resuming from checkpoint" in clone.run("dvc", "repro", "train")
    assert clone.outputs() == expected


def test_two_processes_answer_as_one(before_training: Clone, answered_by_two: Clone, tmp_path: Path) -> None:
    by_two, alone = answered_by_two.outputs(), before_training.outputs()
    for name in ("data/predictions/base.jsonl", "data/predictions/base_batches.jsonl", "data/predictions/base_counts.json"):
        assert by_two[name] == alone[name]
    shutil.copytree(answered_by_two.path, tmp_path / "clone", symlinks=True)
    clone = Clone(tmp_path / "clone")
    # The adapter stays: one process answers with it.
    stage = YAML(typ="safe").load(clone.path / "dvc.yaml")["stages"]["predict"]["cmd"].split()[2:]
    clone.set(hardware__num_processes=1)
    clone.run(sys.executable, *stage)
    assert clone.outputs() == by_two


def test_without_dvc_a_killed_launcher_leaves_no_process(of_two_processes: tuple[Clone, dict[str, bytes]], tmp_path: Path) -> None:
    before, _ = of_two_processes
    shutil.copytree(before.path, tmp_path / "clone", symlinks=True)
    clone = Clone(tmp_path / "clone")
    stage = YAML(typ="safe").load(clone.path / "dvc.yaml")["stages"]["train"]["cmd"].split()[2:]
    launcher = started(clone, sys.executable, *stage)
    wait_for(lambda: checkpoint(clone))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes(clone.path), 30)


@pytest.mark.parametrize("stage", ["train", "predict"])
def test_a_signal_before_anything_was_done_is_one_line(clone: Clone, stage: str) -> None:
    stopped = started(clone, sys.executable, "-m", f"stages.{stage}", "--help")
    wait_for(lambda: catches(stopped.pid, signal.SIGTERM), 30)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(30) == 75
    assert "[stopped] SIGTERM before anything was done: run again" in log(clone)
    assert "Traceback" not in log(clone)


def test_a_disk_that_fills_under_dvc_loses_nothing(clone: Clone, expected: dict[str, bytes]) -> None:
    """The cache on a disk of its own that has no room for the adapter."""
    disk = clone.path.parent / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("only root may make a small disk, and not everywhere")
    try:
        shutil.copytree(clone.path / ".dvc/cache", disk / "cache")
        clone.run("dvc", "cache", "dir", "--local", str(disk / "cache"))
        # DVC says so, records the adapter all the same, and ends with 0.
        assert "No space left" in clone.run("dvc", "repro", "train")
        assert clone.outputs() == expected
        assert "is missing in the cache, part of models/adapter" in clone.run("python", "-m", "tools.verify", fails=True)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        printed = clone.run("python", "-m", "tools.doctor", "--commands", fails=True)
        assert "dvc commit --force train" in printed.splitlines()
        clone.run("dvc", "commit", "--force", "train")
        shutil.rmtree(clone.path / "models/adapter")
        clone.run("dvc", "checkout", "models/adapter")
        assert clone.outputs() == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_signal_before_the_first_update_stops_at_once_and_puts_the_handlers_back() -> None:
    from qlora.core.errors import StoppedError

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(StoppedError, match="SIGUSR1 before the first update") as error, Interruption():
        signal.raise_signal(signal.SIGUSR1)
    assert error.value.exit_code == 75
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with Interruption() as interruption:
        interruption.can_wait = True
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        assert interruption.noted == "SIGHUP"
        interruption._since -= 2
        with pytest.raises(StoppedError, match="a second Ctrl-C"):
            signal.raise_signal(signal.SIGINT)
