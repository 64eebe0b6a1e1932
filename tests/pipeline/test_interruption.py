"""A training that is stopped or killed under the real dvc resumes to the same bytes, and nothing outlives the dvc that started it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks.torture import processes
from qlora.runtime.signals import SIGNALS, Interruption
from tests.pipeline.clone import Clone, ran
from tests.pipeline.interrupting import checkpoint, log, ranks, started, wait_for


@pytest.fixture(scope="module")
def expected(whole_training: Clone) -> dict[str, bytes]:
    """What a training makes that nothing stops."""
    return whole_training.outputs()


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


def another_checkpoint(clone: Clone, before: Any) -> Any:
    """Those that were not there before."""
    return set(checkpoint(clone)) - set(before)


def test_signals_end_the_training_with_a_checkpoint_and_a_rerun_goes_on(clone: Clone, expected: dict[str, bytes]) -> None:
    """One training that is stopped twice."""
    before: Any = []
    for name in ("SIGTERM", "SIGINT"):
        dvc = started(clone, "dvc", "repro", "train", **TOKENS)
        wait_for(lambda before=before: another_checkpoint(clone, before))
        (trainer,) = processes(clone.path, "-m stages.train")
        os.kill(trainer, getattr(signal, name))
        assert dvc.wait(60) != 0
        assert f"[stopped] {name} at step" in log(clone)
        before = checkpoint(clone)
        assert before
        assert files_with_a_token(clone.path) == []
    assert "Traceback" not in log(clone)
    assert log(clone).count("exited with 75") == 2
    assert log(clone).count("resuming from checkpoint") == 1
    assert ran(again := clone.run("dvc", "repro", "train", **TOKENS)) == {"train"}
    assert SECRET not in log(clone) + again
    assert "resuming from checkpoint" in again
    assert clone.outputs() == expected
    assert files_with_a_token(clone.path) == []


def test_a_killed_training_goes_on_and_none_outlives_its_dvc(clone: Clone, expected: dict[str, bytes]) -> None:
    """One training that is killed three times: with its dvc, whatever the shell that dvc runs it by, and alone, before edits outside the training."""
    before: Any = []
    for shell in ("/bin/sh", None, "of the trainer"):
        # The second one begins at once and waits for the first to end.
        dvc = started(clone, "dvc", "repro", "train", **({} if shell == "of the trainer" else {"SHELL": shell}))
        wait_for(lambda before=before: another_checkpoint(clone, before))
        before = checkpoint(clone)
        if shell == "of the trainer":
            (trainer,) = processes(clone.path, "-m stages.train")
            os.kill(trainer, signal.SIGKILL)
            assert dvc.wait(60) != 0
        else:
            dvc.kill()
            dvc.wait()
    for name in ("qlora/scoring/report/__init__.py", "qlora/delivery/hub.py", "qlora/runtime/locks.py", "stages/evaluate.py", "tools/compare.py"):
        with (clone.path / name).open("a", encoding="utf-8") as file:
            file.write("# edited\n")
    assert ran(again := clone.run("dvc", "repro", "train")) == {"train"}
    assert "resuming from checkpoint" in again
    assert processes(clone.path) == []
    assert clone.outputs() == expected


def test_two_at_once_make_one_result(clone: Clone, expected: dict[str, bytes]) -> None:
    both = [started(clone, "dvc", "repro", "train") for _ in range(2)]
    statuses = [dvc.wait(200) for dvc in both]
    assert 0 in statuses
    if any(statuses):
        assert any(words in log(clone) for words in ("is busy", "Unable to acquire lock", "is training in"))
    clone.repro("train")
    assert clone.outputs() == expected


def test_a_training_by_two_processes_goes_on(of_two_processes: tuple[Clone, dict[str, bytes]], tmp_path: Path) -> None:
    """One training that ends three times before its time: without dvc by its launcher's death, by that of a rank, and by a signal to the stage."""
    ready, expected = of_two_processes
    shutil.copytree(ready.path, tmp_path / "clone", symlinks=True)
    clone = Clone(tmp_path / "clone")
    stage = YAML(typ="safe").load(clone.path / "dvc.yaml")["stages"]["train"]["cmd"].split()[2:]
    launcher = started(clone, sys.executable, *stage)
    wait_for(lambda: checkpoint(clone))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes(clone.path), 30)

    for victim in ("the first rank", "the stage"):
        before, already = checkpoint(clone), len(log(clone))
        dvc = started(clone, "dvc", "repro", "train")
        wait_for(lambda before=before: another_checkpoint(clone, before))
        first, second = ranks(clone.path, "-m stages.train")
        (stage_pid,) = {*processes(clone.path, "-m stages.train")} - {first, second}
        os.kill(*((first, signal.SIGKILL) if victim == "the first rank" else (stage_pid, signal.SIGTERM)))
        assert dvc.wait(60) != 0
        wait_for(lambda: not processes(clone.path), 60)
        said = log(clone)[already:]
        assert "resuming from checkpoint" in said
        assert "Traceback" not in said
        if victim == "the first rank":
            assert "[rank-died] process 0 of 2 was ended by SIGKILL" in said
        else:
            assert said.count("[stopped] SIGTERM at step") == 1
            assert "exited with 75" in said
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
