"""What doctor finds, and that the command which it prints fixes it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.torture import processes
from qlora.core.dvc_lock import cached, recorded_outputs
from tests.helpers import ended_queue, queue_tasks, start_queue
from tests.pipeline.clone import Clone
from tools import doctor

SECONDS_OF_EVALUATE = ("-S", "evaluate.resamples=50000")
"""Of an experiment: what a kill leaves in Git, in the queue and in DVC's locks depends on no stage, and this one needs no model."""


def commands(clone: Clone) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.doctor", "--commands"], cwd=clone.path, env=clone.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, bool(done.stdout)) in ((0, False), (3, True)), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def fixed(clone: Clone, expected: str) -> None:
    """Doctor prints one command that begins so; it is run, and nothing is left to find."""
    (line,) = commands(clone)
    assert line.startswith(expected), line
    clone.run("bash", "-c", line)
    assert commands(clone) == []


def test_a_healthy_checkout_has_no_finding(built: Clone) -> None:
    assert f"{len(doctor.CHECKS)} checks, nothing found" in built.run("python", "-m", "tools.doctor")


def test_a_detached_head_goes_back_to_its_branch_and_no_edit_is_lost(built: Clone) -> None:
    built.run("git", "commit", "--quiet", "--allow-empty", "--message", "another")
    built.run("git", "checkout", "--quiet", "--detach", "HEAD~1")
    (built.path / "README.md").write_text("edited\n", encoding="utf-8")
    (built.path / "LICENSE").write_text("staged\n", encoding="utf-8")
    built.run("git", "add", "LICENSE")
    assert "HEAD is on no branch" in built.run("python", "-m", "tools.doctor", fails=True)
    fixed(built, "git symbolic-ref HEAD refs/heads/main")
    assert built.run("git", "symbolic-ref", "--short", "HEAD") == "main\n"
    assert (built.path / "README.md").read_text(encoding="utf-8") == "edited\n"
    assert (built.path / "LICENSE").read_text(encoding="utf-8") == "staged\n"


@pytest.mark.parametrize("moment", ["experiment", "stage"])
def test_what_was_edited_before_an_experiment_that_was_killed_is_kept(built: Clone, moment: str) -> None:
    (built.path / "README.md").write_text("edited\n", encoding="utf-8")
    command = ["dvc", "exp", "run", *SECONDS_OF_EVALUATE]
    log = (built.path.parent / "log").open("wb")
    dvc = subprocess.Popen(command, cwd=built.path, env=built.environment, stdout=log, stderr=log, start_new_session=True)
    while dvc.poll() is None:
        if processes(built.path, "-m stages.") if moment == "stage" else built.run("git", "for-each-ref", "refs/exps/exec"):
            break
        time.sleep(0.01)
    for pid in processes(built.path):
        os.kill(pid, signal.SIGKILL)
    log.close()
    assert dvc.wait() == -signal.SIGKILL, (built.path.parent / "log").read_text(encoding="utf-8")
    for _ in range(2):
        for line in commands(built):
            if not line.startswith("dvc repro"):
                built.run("bash", "-c", line)
    assert built.run("git", "symbolic-ref", "--short", "HEAD") == "main\n"

    def kept() -> bool:
        """In the file, or where `git stash pop` finds it, by the moment of the kill."""
        in_file = (built.path / "README.md").read_text(encoding="utf-8") == "edited\n"
        return in_file or "+edited" in built.run("git", "stash", "show", "--patch", "stash@{0}")

    assert kept()
    built.run(*command)
    assert kept()
    assert built.run("git", "symbolic-ref", "--short", "HEAD") == "main\n"


def test_references_of_a_killed_experiment_are_removed(built: Clone) -> None:
    built.run("git", "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    fixed(built, "git update-ref -d refs/exps/exec/EXEC_BASELINE")


def test_locks_of_a_killed_git_are_removed_and_those_of_a_running_one_are_not(built: Clone) -> None:
    left = [built.path / ".git" / name for name in ("index.lock", "refs/exps/exec/EXEC_BASELINE.lock")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "index.lock" in built.run("git", "add", "README.md", fails=True)
    # Git at work: it waits for what it shall read.
    with subprocess.Popen(["git", "hash-object", "--stdin"], cwd=built.path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        assert commands(built) == []
    fixed(built, "rm -f .git/index.lock .git/refs/exps/exec/EXEC_BASELINE.lock")
    built.run("git", "add", "README.md")


def test_a_lock_that_was_cut_off_is_removed(built: Clone) -> None:
    (built.path / ".dvc/tmp/exps").mkdir(parents=True)
    (built.path / ".dvc/tmp/exps/rwlock").write_bytes(b"")
    assert "RWLock-file" in built.run("dvc", "exp", "run", *SECONDS_OF_EVALUATE, fails=True)
    fixed(built, "rm -f .dvc/tmp/exps/rwlock")
    (built.path / ".dvc/tmp/rwlock").write_bytes(b"")
    built.set(predict__max_new_tokens=2)
    assert "RWLock-file" in built.run("dvc", "repro", "baseline", fails=True)
    assert "rm -f .dvc/tmp/rwlock" in commands(built)
    built.run("rm", "-f", ".dvc/tmp/rwlock")
    assert "rm -f .dvc/tmp/rwlock" not in commands(built)
    assert built.repro("baseline") == {"baseline"}


def test_a_shallow_clone_is_deepened(built: Clone, tmp_path: Path) -> None:
    built.commit("another")
    built.run("git", "clone", "--quiet", "--depth", "1", f"file://{built.path}", str(tmp_path / "shallow"))
    shallow = Clone(tmp_path / "shallow")
    assert "git fetch --unshallow" in commands(shallow)
    shallow.run("git", "fetch", "--unshallow")
    assert "git fetch --unshallow" not in commands(shallow)


def test_a_missing_file_is_brought_back(built: Clone) -> None:
    (built.path / "data/raw/micro/train.jsonl").unlink()
    fixed(built, "git checkout -- data/raw/micro/train.jsonl")


@pytest.mark.parametrize(
    ("name", "quoted"), [("mine.jsonl", "data/raw/micro/mine.jsonl.dvc"), ("my rows.jsonl", "'data/raw/micro/my rows.jsonl'.dvc")]
)
def test_a_missing_file_that_dvc_tracks_is_brought_back(built: Clone, name: str, quoted: str) -> None:
    path = f"data/raw/micro/{name}"
    shutil.copy(built.path / "data/raw/micro/train.jsonl", built.path / path)
    built.run("dvc", "add", "--quiet", path)
    built.set(data__train_file=path)
    (built.path / path).unlink()
    fixed(built, f"dvc checkout {quoted}")


def test_a_damaged_object_of_the_cache_is_removed_and_made_again(built: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.path)
    before = built.outputs()
    place = cached(recorded_outputs()["data/prepared/test.jsonl"])
    place.chmod(0o644)
    place.write_bytes(b"rotten")
    place.chmod(0o444)
    fixed(built, f"rm -f {place.relative_to(built.path)}" if not place.is_absolute() else f"rm -f {place}")
    assert built.outputs() == before


def test_a_changed_output_is_made_again(built: Clone) -> None:
    (built.path / "metrics/evaluate.json").write_text("{}\n", encoding="utf-8")
    fixed(built, "dvc repro")


def test_what_killed_runs_left_is_removed(built: Clone) -> None:
    (built.path / ".dvc/tmp/exps/tmpabc").mkdir(parents=True)
    assert commands(built) == ["rm -rf .dvc/tmp/exps/tmp*"]
    built.run("bash", "-c", "rm -rf .dvc/tmp/exps/tmp*")
    (built.path / "reports/train.json.4194305.partial").write_text("half", encoding="utf-8")
    fixed(built, "rm -rf reports/train.json.4194305.partial")
    (built.path / ".dvc/tmp/checkpoints/0123456789abcdef/checkpoint-3").mkdir(parents=True)
    (line,) = commands(built)
    assert line.startswith("dvc repro   # or, to throw them away: rm -rf .dvc/tmp/checkpoints/0123456789abcdef")
    (built.path / ".dvc/tmp/answers/0123456789abcdef").mkdir(parents=True)
    assert commands(built)[1:] == ["dvc repro   # or, to throw them away: rm -rf .dvc/tmp/answers/0123456789abcdef"]


def test_a_base_model_that_is_not_there_is_linked(built: Clone) -> None:
    shutil.move(built.path / "models/base/tiny", built.path.parent / "elsewhere")
    assert commands(built) == ["git checkout -- models/base/tiny.json", "python -m tools.pin tiny --path DIR"][1:]
    built.set(base_model__name="absent")
    lines = commands(built)
    assert "python -m tools.pin absent --path DIR" in lines


def test_wrong_params_are_named(built: Clone) -> None:
    path = built.path / "params.yaml"
    path.write_text(
        path.read_text(encoding="utf-8").replace("learning_rate: 0.002", "learning_rate: 7").replace("learning_rate: 2e-3", "learning_rate: 7"),
        encoding="utf-8",
    )
    assert "git diff params.yaml" in commands(built)


@pytest.mark.parametrize(
    ("name", "text"), [("params.yaml", "lora: {r: 8}\n"), ("params.yaml", "a: [\n"), ("dvc.yaml", "stages: [\n"), ("dvc.lock", "a: b: c\n")]
)
def test_a_damaged_file_silences_no_other_check(built: Clone, name: str, text: str) -> None:
    built.run("git", "checkout", "--quiet", "--detach")
    (built.path / name).write_text(text, encoding="utf-8")
    lines = commands(built)
    assert "git symbolic-ref HEAD refs/heads/main && git reset --quiet" in lines
    assert [line for line in lines if name in line]
    for line in lines:
        built.run("bash", "-c", line)
    built.run("git", "checkout", "--", name)
    assert commands(built) == []


def test_another_environment_is_named(built: Clone, tmp_path: Path) -> None:
    (built.path / "requirements.txt").write_text("torch==0.0.1\n", encoding="utf-8")
    assert "make setup" in commands(built)
    built.run("git", "checkout", "--", "requirements.txt")
    built.environment["PATH"] = "/usr/bin:/bin"
    assert any(line.startswith("source ") and line.endswith("bin/activate") for line in commands(built))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_a_folder_of_another_user_is_named(built: Clone) -> None:
    for name in ("metrics", "reports"):
        os.chown(built.path / name, 12345, 12345)
    assert "metrics, reports belong to another user" in built.run("python", "-m", "tools.doctor", fails=True)
    fixed(built, "sudo chown" if shutil.which("sudo") else "chown")


def test_little_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_BYTES", 1 << 60)
    (finding,) = doctor.little_room()
    assert finding.fix == "dvc gc --workspace --all-branches --all-tags --all-experiments"


def test_a_queue_task_whose_worker_was_killed_can_be_removed_and_queued_again(built: Clone) -> None:
    queued = ["dvc", "exp", "run", "--queue", "--name", "killed", *SECONDS_OF_EVALUATE]
    built.run(*queued)
    start_queue(built, 1)
    deadline = time.monotonic() + 90
    while not processes(built.path, "-m stages.") and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(20):
        for pid in processes(built.path):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    assert queue_tasks(built) == ["Running"]
    lines = commands(built)
    (kill,) = [line for line in lines if line.startswith("dvc queue kill")]
    for line in lines:
        built.run("bash", "-c", line)
    assert kill
    assert queue_tasks(built) == []
    assert not [line for line in commands(built) if "queue" in line]
    # As the command's comment says.
    built.run(*queued)
    start_queue(built, 1)
    assert ended_queue(built) == ["Success"]
    assert "killed" in built.run("dvc", "exp", "list", "--name-only")
