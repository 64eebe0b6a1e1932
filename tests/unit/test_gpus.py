"""Stages of one repository never use one GPU at a time, however they end, and never wait for each other in a ring."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.params import Params
from qlora.runtime import gpus, launcher
from tests.helpers import overlapping
from tests.unit.launching import LAUNCH


def started(folder: Path, needed: int, *names: str, seconds: float = 30, rounds: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.unit.gpu_program", str(folder), str(needed), str(seconds), str(rounds), *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]", of: str = "stdout") -> str:
    stream = getattr(process, of)
    return str(stream.readline()).strip()


@pytest.mark.parametrize(
    ("variable", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("GPU-5a, GPU-7b", 2, ["GPU-5a", "GPU-7b"]), ("1,99,0", 1, ["1"]), ("", 0, []), ("-1", 0, [])],
)
def test_what_a_person_made_visible_is_kept_to(monkeypatch: pytest.MonkeyPatch, variable: str | None, count: int, expected: list[str]) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(gpus.VISIBLE, variable)
    assert gpus.visible(count) == expected


def test_each_sees_its_own_and_the_third_waits_until_one_was_killed(tmp_path: Path) -> None:
    """The one that took fewer than all has begun anew: the same process, the same lock."""
    first = started(tmp_path, 1, "0", "1")
    assert (line(first), line(first)) == ("GPU 0 of 0, 1", "has 0")
    second = started(tmp_path, 1, "0", "1")
    assert (line(second), line(second)) == ("GPU 1 of 0, 1", "has 1")
    third = started(tmp_path, 1, "0", "1")
    said = line(third, "stderr")
    assert said.startswith("warning: waiting for 1 of the GPUs 0, 1: ")
    assert f"0 is used by process {first.pid} on " in said
    assert f"1 is used by process {second.pid} on " in said
    second.kill()
    assert (line(third), line(third)) == ("GPU 1 of 0, 1", "has 1")
    for process in (first, second, third):
        process.kill()
        process.communicate()


def test_who_is_stopped_while_waiting_ends_with_75_and_holds_nothing(tmp_path: Path) -> None:
    first = started(tmp_path, 1, "GPU-5a", "MIG-1/2/0")
    line(first)
    second = started(tmp_path, 2, "GPU-5a", "MIG-1/2/0")
    assert line(second, "stderr").startswith("warning: waiting for 2 of the GPUs")
    second.send_signal(signal.SIGTERM)
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 75
    assert "[stopped] SIGTERM" in errors
    first.kill()
    first.communicate()
    taken = gpus.acquire(2, ["GPU-5a", "MIG-1/2/0"], tmp_path)
    assert taken.names == ["GPU-5a", "MIG-1/2/0"]
    taken.release()


def test_those_that_need_several_never_wait_in_a_ring_and_never_share(tmp_path: Path) -> None:
    processes = [started(tmp_path, needed, *order, seconds=0.02, rounds=8) for needed, order in ((2, "012"), (2, "210"), (2, "120"), (1, "201"))]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    assert len((tmp_path / "log").read_text(encoding="utf-8").splitlines()) == 32
    assert overlapping(tmp_path / "log") == []


def test_several_processes_see_those_of_their_launcher_and_keep_them_when_it_is_killed(tmp_path: Path) -> None:
    code = LAUNCH.replace("import sys;", "import sys; from pathlib import Path; from qlora.runtime import gpus;").replace(
        "sys.argv[1:], 2)", "sys.argv[1:], 2, gpus.acquire(2, ['4', '5', '6'], Path(sys.argv[3])))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, "see", "-1", str(tmp_path), "4"], stdout=subprocess.PIPE, text=True)
    assert line(launcher) == "GPU 4, 5 of 4, 5, 6"
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text(encoding="utf-8") for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in (0, 1)] == ["4,5", "4,5"]
    launcher.kill()
    launcher.wait()
    assert launcher.stdout is not None
    launcher.stdout.close()
    assert gpus._try(2, {name: tmp_path / ".dvc/tmp/gpu" / os.uname().nodename / name for name in "45"}, tmp_path / "guard") is None
    gpus.acquire(2, ["4", "5"], tmp_path).release()


@pytest.mark.parametrize("rank", [False, True], ids=["on the CPU", "as one of several"])
def test_nothing_is_taken(rank: bool, default_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "acquire", lambda *_: pytest.fail("took GPUs"))
    if rank:
        monkeypatch.setenv("WORLD_SIZE", "2")
        hardware = default_params.hardware.model_copy(update={"device": "cuda"})
        launcher.launch_processes("stages.train", hardware, 1)
    else:
        launcher.launch_processes("stages.train", default_params.hardware, 1)


@pytest.mark.parametrize(("strategy", "processes", "expected"), [("ddp", 1, 1), ("fsdp2", 2, 2), ("fsdp2", 8, 3)])
def test_a_stage_of_one_process_takes_what_its_model_is_spread_over(
    strategy: str, processes: int, expected: int, default_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(gpus, "acquire", lambda needed, names, root: asked.append(needed) or gpus.Lease(names, []))
    hardware = default_params.hardware.model_copy(update={"device": "cuda", "strategy": strategy, "num_processes": processes})
    launcher.launch_processes("stages.predict", hardware, 1)
    assert asked == [expected]
