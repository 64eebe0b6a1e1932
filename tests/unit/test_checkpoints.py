"""Checkpoints stand whole or not at all, one process holds their folder, and what was finished can be taken over."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from qlora.core.dvc_lock import fingerprint, md5_of
from qlora.core.errors import MachineError
from qlora.runtime.locks import is_locked
from qlora.training import checkpoints as module
from qlora.training.checkpoints import Checkpoints
from tests.unit.two_processes import PROCESSES


def save(checkpoints: Checkpoints, step: int, content: str = "state") -> None:
    with checkpoints.saving(step):
        folder = checkpoints.aside / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"{content} {step}", encoding="utf-8")


def _write_half(folder: Path) -> None:
    folder.mkdir(parents=True)
    raise ZeroDivisionError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (8, 9, 10):
            save(checkpoints, step)
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-9", "lock"]
        assert checkpoints.newest() == tmp_path / "checkpoint-10"


def test_a_save_that_fails_leaves_the_one_before_it(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(ZeroDivisionError), checkpoints.saving(2):
            _write_half(checkpoints.aside / "checkpoint-2")
        assert names(tmp_path) == ["checkpoint-1", "lock"]


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "saving/checkpoint-3").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == ["lock"]
        assert checkpoints.newest() is None


def test_a_checkpoint_without_its_sums_or_with_a_file_more_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
        (tmp_path / "checkpoint-2/more").write_text("more", encoding="utf-8")
        assert checkpoints.newest() == tmp_path / "checkpoint-1"
        (tmp_path / "checkpoint-1/sums.json").unlink()
        assert checkpoints.newest() is None
    shown = capsys.readouterr().err
    assert "checkpoint-2 can't be resumed from (not as it was written: more)" in shown
    assert "sums.json" in shown


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root may make a small disk")
def test_a_full_disk_says_so_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    """A real one, of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with Checkpoints(disk / "run") as checkpoints:
            save(checkpoints, 1)
            with pytest.raises(MachineError, match=r"disk-full\] no room for the checkpoint of step 2 .* Make room and run again") as error:
                save(checkpoints, 2, "x" * 2_000_000)
            assert error.value.exit_code == 3
            assert checkpoints.newest() == disk / "run/checkpoint-1"
            with pytest.raises(MachineError, match=r"disk-full"), checkpoints.saving(2):
                # As torch says it.
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device")
            with pytest.raises(MachineError, match=r"disk-space\] .* MB left, the training needs up to"):
                checkpoints.require_room(1_000_000, "adamw_torch")
            # What was made is too large to be kept: the checkpoint stays to begin a rerun from.
            (tmp_path / "report").write_bytes(b"x" * 2_000_000)
            checkpoints.finish({"report": tmp_path / "report"})
            assert checkpoints.newest() == disk / "run/checkpoint-1"
            assert checkpoints.finished() is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _hold(folder: Path, held: Any) -> None:
    with Checkpoints(folder):
        held.set()
        time.sleep(60)


def test_a_second_process_waits_and_then_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    held = PROCESSES.Event()
    holder = PROCESSES.Process(target=_hold, args=(tmp_path / "run", held))
    holder.start()
    try:
        assert held.wait(60)
        assert is_locked(tmp_path / "run" / "lock")
        with pytest.raises(MachineError, match=rf"train-running\] process {holder.pid} on .* is training in"), Checkpoints(tmp_path / "run"):
            pass
    finally:
        # However it ends, the folder is free.
        holder.kill()
        holder.join()
    with Checkpoints(tmp_path / "run"):
        assert (tmp_path / "run/lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} ")


def test_a_folder_that_is_being_removed_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training ended there, and another one prunes it, holding its lock."""
    with Checkpoints(tmp_path / "other") as other:
        shutil.rmtree(other.folder)
        with Checkpoints(tmp_path / "other") as again:
            assert (again.folder / "lock").is_file()
    for _ in range(2):
        with Checkpoints(tmp_path / "ended"):
            (tmp_path / "ended/finished").mkdir()
        with Checkpoints(tmp_path / "run") as run:
            run.prune()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
    assert "waiting" not in capsys.readouterr().err


def test_looking_at_a_lock_changes_nothing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "no/lock")
    assert not (tmp_path / "no").exists()
    with Checkpoints(tmp_path / "run"):
        before = (tmp_path / "run/lock").read_bytes()
        assert is_locked(tmp_path / "run/lock")
        assert (tmp_path / "run/lock").read_bytes() == before != b""
    assert not is_locked(tmp_path / "run/lock")


def made(folder: Path) -> dict[str, Path]:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/weights").write_text("weights", encoding="utf-8")
    (folder / "report").write_text("report", encoding="utf-8")
    return {"adapter_folder": folder / "adapter", "report": folder / "report"}


def test_what_was_finished_takes_the_place_of_the_checkpoints_and_of_what_is_there(tmp_path: Path) -> None:
    outputs = made(tmp_path / "out")
    with Checkpoints(tmp_path / "run") as checkpoints:
        save(checkpoints, 1)
        checkpoints.finish(outputs)
        assert names(tmp_path / "run") == ["finished", "lock"]
        shutil.rmtree(outputs["adapter_folder"])
        outputs["report"].write_text("another", encoding="utf-8")
        assert checkpoints.reuse_finished(outputs)
    assert (outputs["adapter_folder"] / "weights").read_text(encoding="utf-8") == "weights"
    assert outputs["report"].read_text(encoding="utf-8") == "report"
    assert names(tmp_path / "out") == ["adapter", "report"]


def test_a_damaged_finished_run_is_not_reused(tmp_path: Path) -> None:
    outputs = made(tmp_path / "out")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.finish(outputs)
        (tmp_path / "run/finished/report").write_text("changed", encoding="utf-8")
        assert checkpoints.finished() is None
        outputs["report"].write_text("another", encoding="utf-8")
        assert not checkpoints.reuse_finished(outputs)
    assert outputs["report"].read_text(encoding="utf-8") == "another"


def test_what_dvc_has_stored_is_not_reused_and_others_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = made(tmp_path / "out")
    with Checkpoints(tmp_path / "other") as other:
        other.finish(outputs)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.finish(outputs)
        recorded = {str(outputs["adapter_folder"]): md5_of(tmp_path / "run/finished/adapter_folder")}
        monkeypatch.setattr(module, "recorded_outputs", lambda: recorded)
        outputs["report"].write_text("another", encoding="utf-8")
        assert not checkpoints.reuse_finished(outputs)
        assert outputs["report"].read_text(encoding="utf-8") == "another"
        assert names(tmp_path) == ["out", "run"]
        recorded.clear()
        assert checkpoints.reuse_finished(outputs)
    assert outputs["report"].read_text(encoding="utf-8") == "report"


def test_finished_runs_of_others_are_pruned_but_not_unfinished_or_running_ones(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "finished") as checkpoints:
        checkpoints.finish(made(tmp_path / "out"))
    with Checkpoints(tmp_path / "unfinished") as checkpoints:
        save(checkpoints, 1)
    with Checkpoints(tmp_path / "running") as running, Checkpoints(tmp_path / "own") as own:
        running.finish({"report": tmp_path / "out/report"})
        own.prune()
    assert names(tmp_path) == ["out", "own", "running", "unfinished"]


def test_a_fingerprint_depends_on_every_value_and_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1", encoding="utf-8")
    values: dict[str, Any] = {"train": {"seed": 1}}
    before = fingerprint(values, [path])
    assert before == fingerprint(dict(values), [path])
    assert before != fingerprint({"train": {"seed": 2}}, [path])
    path.write_text("2", encoding="utf-8")
    assert before != fingerprint(values, [path])
