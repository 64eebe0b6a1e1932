"""Several processes of one stage begin, fail and end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.launching import LAUNCH


def started(action: str, rank: int) -> "subprocess.Popen[str]":
    # Nothing that hangs ends by itself: there it is of no use to wait for that.
    code = LAUNCH.replace("; command.run", "; ranks.GRACE_SECONDS = 2.0; command.run") if action == "hang" else LAUNCH
    return subprocess.Popen([sys.executable, "-c", code, action, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(action: str, rank: int = -1) -> tuple[int, str, str]:
    process = started(action, rank)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_they_meet_and_the_first_prints() -> None:
    assert ended("meet") == (0, "rank 0 of 2: 3\n", "")


def test_what_all_refuse_is_said_once() -> None:
    status, _, errors = ended("refuse")
    assert status == 2
    assert errors.strip() == "error: [data-empty] the value of rank 0"


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [("refuse", 2, "[data-empty] the value of rank 1"), ("fail", 3, "[disk-full] no room for rank 1"), ("term", 75, "[stopped] SIGTERM")],
)
def test_what_one_alone_has_to_say_is_said_with_its_number(action: str, status: int, said: str) -> None:
    found, _, errors = ended(action, 1)
    assert found == status
    assert "process 1 of 2:" in errors
    assert said in errors
    assert "rank-died" not in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_ends_another_that_would_wait_for_ever(rank: int) -> None:
    """Also one that was begun after it."""
    began = time.monotonic()
    status, _, errors = ended("hang", rank)
    assert status == 3
    assert f"[disk-full] no room for rank {rank}" in errors
    assert time.monotonic() - began < 50


def test_what_the_first_alone_has_to_say_is_said_once() -> None:
    status, _, errors = ended("fail", 0)
    assert status == 3
    assert errors.strip() == "error: [disk-full] no room for rank 0"


def test_nobody_else_can_speak_to_them() -> None:
    process = started("stop", -1)
    assert process.stdout is not None
    process.stdout.readline()
    sockets = {os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
    listening = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{name}").read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1].split(":")[0])
    process.terminate()
    process.communicate(timeout=20)
    assert listening == ["0100007F"]


def test_one_process_named_by_a_cluster_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.runtime.launcher import is_rank

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_rank()
    # The only process of a cluster.
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("QLORA_LAUNCHER", "1")
    assert is_rank()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_one_ends_the_others_and_is_named(rank: int) -> None:
    status, _, errors = ended("kill", rank)
    assert status == 3
    assert f"[rank-died] process {rank} of 2 was ended by SIGKILL" in errors
    assert "Traceback" not in errors


def test_a_bug_of_one_keeps_its_traceback() -> None:
    status, _, errors = ended("break", 1)
    assert status == 1
    assert "RuntimeError: a bug" in errors


def test_a_signal_reaches_each_of_them() -> None:
    process = started("stop", -1)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # The other one, whose output is not shown, begins at the same time.
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
