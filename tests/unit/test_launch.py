"""Several processes of one stage begin, fail and end together."""

import signal
import subprocess
import sys
import time

import pytest

LAUNCH = "import sys; from qlora import command, launch; command.run(lambda: launch.launch('tests.unit.rank_program', sys.argv[1:], 2))"


def started(action: str, rank: int) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", LAUNCH, action, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


def test_what_one_refuses_is_said_with_its_number() -> None:
    status, _, errors = ended("refuse", 1)
    assert status == 2
    assert "process 1 of 2:" in errors
    assert "[data-empty] the value of rank 1" in errors
    assert "Traceback" not in errors


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
