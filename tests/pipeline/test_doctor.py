"""What doctor finds, and that the command which it prints fixes it."""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.torture import processes, until_quiet
from qlora.core.dvc_lock import cached, recorded_outputs
from tests.helpers import ended_queue, queue_tasks, start_queue
from tests.pipeline.clone import Clone
from tests.pipeline.interrupting import started, wait_for
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


def silent_after(clone: Clone, *command: str, fails: bool = False) -> None:
    """Doctor finds nothing after the command; what it changed is taken back."""
    clone.run(*command, fails=fails)
    assert commands(clone) == [], command
    clone.run("bash", "-c", "git checkout --quiet -- . && dvc checkout --quiet")


def stop(clone: Clone, *command: str) -> None:
    """Ctrl-C, once a stage is there: the terminal sends it to every process of the command."""
    dvc = started(clone, *command)
    wait_for(lambda: processes(clone.path, "-m stages."))
    os.killpg(dvc.pid, signal.SIGINT)
    assert dvc.wait(60) != 0
    until_quiet(clone.path, "a process is left", 60)


def test_nothing_is_found_after_a_stage_was_stopped(built: Clone) -> None:
    for stage in ("prepare", "baseline", "train", "predict", "evaluate"):
        stop(built, "dvc", "repro", "--force", "--single-item", stage)
        assert commands(built) == [], stage
    # What each of them had removed comes back from Git and the cache.
    silent_after(built, "true")


def test_nothing_is_found_after_experiments_good_refused_and_stopped(built: Clone) -> None:
    good, bad = "evaluate.resamples=2000", "evaluate.resamples=-1"
    silent_after(built, "dvc", "exp", "run", "--name", "good", "-S", good)
    silent_after(built, "dvc", "exp", "run", "-S", bad, fails=True)
    silent_after(built, "dvc", "exp", "run", "--temp", "-S", "evaluate.resamples=3000")
    silent_after(built, "dvc", "exp", "run", "--temp", "-S", bad, fails=True)
    for option in ("--force", "--temp"):
        stop(built, "dvc", "exp", "run", option, *SECONDS_OF_EVALUATE)
        silent_after(built, "true")
    silent_after(built, "dvc", "exp", "apply", "good")
    built.run("dvc", "exp", "branch", "good", "of-good")
    # Without `dvc checkout`: the outputs are those of the branch before.
    built.run("git", "switch", "--quiet", "of-good")
    silent_after(built, "true")
    silent_after(built, "dvc", "exp", "remove", "good")


def test_a_healthy_checkout_has_no_finding(built: Clone) -> None:
    assert f"{len(doctor.CHECKS)} checks, nothing found" in built.run("python", "-m", "tools.doctor")


def edit(clone: Clone) -> dict[str, str]:
    """Edits of each kind: staged, staged and edited again, unstaged, untracked. Returns them, as `edits` does."""
    for name, staged, text in (("LICENSE", "staged", "staged"), ("SECURITY.md", "first", "second"), ("README.md", "", "edited"), ("mine", "", "new")):
        if staged:
            (clone.path / name).write_text(f"{staged}\n", encoding="utf-8")
            clone.run("git", "add", name)
        (clone.path / name).write_text(f"{text}\n", encoding="utf-8")
    return edits(clone)


def edits(clone: Clone) -> dict[str, str]:
    """What the files hold, and what the index holds of those that were staged."""
    files = {name: (clone.path / name).read_text(encoding="utf-8") for name in ("LICENSE", "SECURITY.md", "README.md", "mine")}
    return files | {f":{name}": clone.run("git", "show", f":{name}") for name in ("LICENSE", "SECURITY.md")}


def detach_as_a_killed_experiment(clone: Clone) -> None:
    """By the very calls of DVC, whose process ends in the middle."""
    code = "import os, dvc.scm; left = dvc.scm.SCM('.').detach_head(client='dvc', force=True); left.__enter__(); os._exit(1)"
    clone.run(sys.executable, "-c", code, fails=True)
    (clone.path / ".dvc/tmp/exps").mkdir(parents=True, exist_ok=True)


def test_a_head_that_a_killed_experiment_detached_goes_back_to_its_branch(built: Clone) -> None:
    built.run("git", "switch", "--quiet", "--create", "my/branch")
    detach_as_a_killed_experiment(built)
    # As another experiment would, that ran well afterwards.
    detach_as_a_killed_experiment(built)
    before = edit(built)
    (built.path / doctor.ARGUMENTS).touch()
    built.run("git", "add", "--force", str(doctor.ARGUMENTS))
    fixed(built, "git symbolic-ref HEAD refs/heads/my/branch")
    assert built.run("git", "ls-files", str(doctor.ARGUMENTS)) == ""
    assert built.run("git", "symbolic-ref", "--short", "HEAD") == "my/branch\n"
    assert edits(built) == before


def test_commits_that_were_made_after_it_stay_on_a_branch(built: Clone) -> None:
    detach_as_a_killed_experiment(built)
    (built.path / "LICENSE").write_text("committed\n", encoding="utf-8")
    built.run("git", "commit", "--quiet", "--all", "--message", "mine")
    made = built.run("git", "rev-parse", "HEAD").strip()
    before = edit(built)
    fixed(built, f"git branch detached-{made[:12]} {made} && git symbolic-ref HEAD refs/heads/main")
    assert built.run("git", "branch", "--contains", made, "--format=%(refname:short)").split() == [f"detached-{made[:12]}"]
    assert edits(built) == before


@pytest.mark.parametrize(
    "command",
    [
        "git checkout --quiet HEAD~1",
        "git checkout --quiet old",
        "git switch --quiet --detach",
        "git bisect start && git bisect bad HEAD && git bisect good HEAD~2",
        "git rebase --exec false HEAD~1 || true",
    ],
)
def test_a_commit_that_was_checked_out_on_purpose_is_no_finding(built: Clone, command: str) -> None:
    for message in ("one", "two"):
        built.run("git", "commit", "--quiet", "--allow-empty", "--message", message)
    built.run("git", "tag", "old", "HEAD~1")
    detach_as_a_killed_experiment(built)
    built.run("git", "symbolic-ref", "HEAD", "refs/heads/main")
    built.run("git", "reflog", "expire", "--expire=now", "--all")
    built.run("bash", "-c", command)
    built.run("git", "symbolic-ref", "HEAD", fails=True)
    assert commands(built) == []


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


def test_references_of_a_killed_experiment_are_removed_and_its_edits_kept(built: Clone) -> None:
    before = edit(built)
    put_aside = built.run("git", "stash", "create").strip()
    for name, commit in (("BASELINE", "HEAD"), ("HEAD", "HEAD"), ("APPLY", "HEAD"), ("MERGE", put_aside)):
        built.run("git", "update-ref", f"refs/exps/exec/EXEC_{name}", commit)
    (built.path / "README.md").write_text("edited again\n", encoding="utf-8")
    # HEAD and APPLY are there after good experiments too.
    fixed(built, "git stash store --message ")
    assert built.run("git", "for-each-ref", "--format=%(refname:lstrip=3)", "refs/exps/exec").split() == ["EXEC_APPLY", "EXEC_HEAD"]
    assert edits(built) == {**before, "README.md": "edited again\n"}
    assert "+edited\n" in built.run("git", "stash", "show", "--patch")


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


def test_every_check_works_in_a_worktree(built: Clone, tmp_path: Path) -> None:
    built.run("git", "worktree", "add", "--quiet", str(tmp_path / "worktree"))
    worktree = Clone(tmp_path / "worktree")
    assert commands(worktree) == []
    own = built.path / ".git/worktrees/worktree/index.lock"
    shared = built.path / ".git/packed-refs.lock"
    own.touch()
    shared.touch()
    # It belongs to the other worktree, but what it holds is shared.
    with subprocess.Popen(["git", "hash-object", "--stdin"], cwd=built.path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        assert commands(worktree) == []
    fixed(worktree, f"rm -f {shared} {own}")
    detach_as_a_killed_experiment(worktree)
    fixed(worktree, "git symbolic-ref HEAD refs/heads/worktree")


def test_a_fresh_clone_has_no_finding(built: Clone, tmp_path: Path) -> None:
    built.run("git", "clone", "--quiet", str(built.path), str(tmp_path / "fresh"))
    assert commands(Clone(tmp_path / "fresh")) == []


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
    fixed(built, f"git add {shlex.quote(f'{path}.dvc')}")
    (built.path / path).unlink()
    fixed(built, f"dvc checkout {quoted}")


def test_a_missing_file_of_a_folder_that_dvc_tracks_is_brought_back(built: Clone) -> None:
    shutil.copytree(built.path / "data/raw/micro", built.path / "data/raw/mine")
    built.run("dvc", "add", "--quiet", "data/raw/mine")
    (built.path / "data/raw/mine.source.json").write_text("{}\n", encoding="utf-8")
    built.set(data__train_file="data/raw/mine/train.jsonl", data__test_file="data/raw/mine/test.jsonl")
    fixed(built, "git add data/raw/mine.dvc data/raw/mine.source.json data/raw/.gitignore")
    shutil.rmtree(built.path / "data/raw/mine")
    fixed(built, "dvc checkout data/raw/mine.dvc || dvc pull data/raw/mine.dvc")


def test_what_a_recipe_needs_is_downloaded_by_its_own_commands(built: Clone) -> None:
    built.run("python", "-m", "tools.recipes", "use", "llama3-8b-16gb")
    assert commands(built) == [
        "python -m tools.pin llama3-8b-instruct --repo-id meta-llama/Meta-Llama-3-8B-Instruct --revision 8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
        "python -m tools.fetch HuggingFaceH4/no_robots --revision e6f9a4ac5c37faeb744ba9ecf0473184d7f8105b",
    ]


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


def test_outputs_of_another_commit_are_no_finding(built: Clone) -> None:
    """As after `git checkout` without `dvc checkout`."""
    lock = built.path / "dvc.lock"
    md5 = hashlib.md5((built.path / "reports/report.html").read_bytes()).hexdigest()
    lock.write_text(lock.read_text(encoding="utf-8").replace(md5, "a" * 32), encoding="utf-8")
    assert commands(built) == []


def test_what_killed_runs_left_is_removed(built: Clone) -> None:
    (built.path / ".dvc/tmp/exps/tmpabc").mkdir(parents=True)
    assert commands(built) == ["rm -rf .dvc/tmp/exps/tmp*"]
    built.run("bash", "-c", "rm -rf .dvc/tmp/exps/tmp*")
    (built.path / "reports/train.json.4194305.partial").write_text("half", encoding="utf-8")
    fixed(built, "rm -rf reports/train.json.4194305.partial")
    (built.path / ".dvc/tmp/checkpoints/0123456789abcdef/checkpoint-3").mkdir(parents=True)
    (built.path / ".dvc/tmp/answers/0123456789abcdef").mkdir(parents=True)
    # Worth knowing, but nothing is wrong: a rerun resumes.
    assert commands(built) == []
    said = built.run("python", "-m", "tools.doctor")
    for kind in ("checkpoints", "answers"):
        assert f"note: .dvc/tmp/{kind}/0123456789abcdef holds {kind} of an interrupted " in said
        assert f"    dvc repro   # or, to throw them away: rm -rf .dvc/tmp/{kind}/0123456789abcdef\n" in said


def test_a_base_model_that_is_not_there_is_linked(built: Clone) -> None:
    (built.path / "models/base/tiny.json").unlink()
    shutil.rmtree(built.path / "models/base/tiny")
    fixed(built, "git checkout -- models/base/tiny.json models/base/tiny")
    shutil.copytree(built.path / "models/base/tiny", built.path.parent / "elsewhere")
    built.set(base_model__name="mine")
    assert commands(built) == ["python -m tools.pin mine --path DIR"]
    built.run("python", "-m", "tools.pin", "mine", "--path", str(built.path.parent / "elsewhere"))
    assert commands(built) == []


def test_a_wrong_value_is_a_note(built: Clone) -> None:
    """Somebody set it, and every stage says so."""
    path = built.path / "params.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("learning_rate: 0.002", "learning_rate: 7").replace("learning_rate: 2e-3", "learning_rate: 7"), encoding="utf-8")
    assert commands(built) == []
    said = built.run("python", "-m", "tools.doctor")
    assert said.count("train.learning_rate = 7") == 1
    assert "\n    git diff params.yaml\n" in said


@pytest.mark.parametrize(
    ("name", "text"), [("params.yaml", "lora\n"), ("params.yaml", "a: [\n"), ("dvc.yaml", "stages: [\n"), ("dvc.lock", "a: b: c\n")]
)
def test_a_damaged_file_silences_no_other_check(built: Clone, name: str, text: str) -> None:
    detach_as_a_killed_experiment(built)
    before = edit(built)
    (built.path / name).write_text(text, encoding="utf-8")
    lines = commands(built)
    assert "git symbolic-ref HEAD refs/heads/main" in lines
    assert [line for line in lines if name in line]
    for line in lines:
        built.run("bash", "-c", line)
    built.run("git", "checkout", "--", name)
    assert commands(built) == []
    assert edits(built) == before


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
    built.run("dvc", "exp", "run", "--queue", "-S", "evaluate.resamples=-1")
    start_queue(built, 1)
    assert sorted(ended_queue(built)) == ["Failed", "Success"]
    assert "killed" in built.run("dvc", "exp", "list", "--name-only")
    # A queue in which one experiment was good and one was refused.
    assert commands(built) == []


def test_params_that_a_kill_emptied_come_from_git(built: Clone) -> None:
    before = (built.path / "params.yaml").read_bytes()
    (built.path / "params.yaml").write_bytes(b"")
    assert "git checkout HEAD -- params.yaml" in commands(built)
    built.run("git", "checkout", "HEAD", "--", "params.yaml")
    assert (built.path / "params.yaml").read_bytes() == before
    assert commands(built) == []
