"""Several machines, which are processes of this one here: the first begins a stage, another one joins."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from qlora.core.errors import InputError, MachineError
from qlora.runtime import rendezvous

LAUNCH = (
    "import sys; from qlora.runtime import command, launcher; command.run(lambda: launcher.launch('tests.unit.rank_program', sys.argv[1:], {}, 2))"
)
WAIT_SECONDS = 60


@pytest.fixture
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def begun(action: str, rank: int = -1, count: int = 2) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LAUNCH.format(count), action, str(rank)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, output, errors


@pytest.fixture
def joined(meeting_point: None) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tools.join", "--seconds", str(WAIT_SECONDS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_they_meet_and_the_first_prints(joined: "subprocess.Popen[str]") -> None:
    assert ended(begun("meet", count=4)) == (0, "rank 0 of 4: 10\n", "")
    joined.send_signal(signal.SIGTERM)
    status, output, errors = ended(joined)
    assert status == 75
    assert output == "machine 2 of 2: tests.unit.rank_program\n"
    assert errors.strip() == "stopped: [stopped] SIGTERM: this machine takes part no more"


def test_a_failure_elsewhere_ends_the_stage_and_the_other_machine_takes_part_in_the_next(joined: "subprocess.Popen[str]") -> None:
    status, _, errors = ended(begun("fail", 1))
    assert status == 3
    assert "[rank-died]" in errors
    assert ended(begun("meet"))[0] == 0
    joined.send_signal(signal.SIGTERM)
    _, output, errors = ended(joined)
    assert output.count("machine 2 of 2") == 2
    assert "process 1 of 2:" in errors
    assert "[disk-full] no room for rank 1" in errors
    assert "Traceback" not in errors


def test_a_share_that_fails_before_they_meet_ends_the_stage(joined: "subprocess.Popen[str]") -> None:
    status, _, errors = ended(begun("early", 1))
    assert status == 3
    assert "[rank-died] the share of another machine ended with 3: `python -m tools.join` says there why" in errors
    # And when nothing more comes, it ends by itself.
    ending = "from qlora.runtime import launcher; launcher.end_all(2)"
    subprocess.run([sys.executable, "-c", ending], check=True, timeout=WAIT_SECONDS)
    status, _, errors = ended(joined)
    assert status == 0
    assert "[disk-full] no room for rank 1" in errors


def test_a_killed_one_ends_those_of_both_machines(joined: "subprocess.Popen[str]") -> None:
    status, _, errors = ended(begun("kill", 0))
    assert status == 3
    assert "[rank-died]" in errors
    joined.send_signal(signal.SIGTERM)
    assert "[rank-died]" in ended(joined)[2]


def test_others_that_never_come_are_waited_for_a_while(meeting_point: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RENDEZVOUS_SECONDS", "1")
    status, _, errors = ended(begun("meet"))
    assert status == 3
    assert (
        f"[rendezvous-timeout] hardware.num_machines = 2, but after 1 s 0 other machine(s) had joined at 127.0.0.1:{os.environ['MASTER_PORT']}"
        in errors
    )


def test_a_first_machine_that_never_answers_is_waited_for_a_while(meeting_point: None) -> None:
    done = subprocess.run([sys.executable, "-m", "tools.join", "--seconds", "1"], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 3
    assert done.stderr.strip().startswith("error: [rendezvous-timeout] nothing to run came from 127.0.0.1:")


def test_a_signal_ends_the_waiting(meeting_point: None) -> None:
    process = begun("meet")
    port = int(os.environ["MASTER_PORT"])
    for _ in range(WAIT_SECONDS * 10):
        with socket.socket() as client:
            client.settimeout(0.1)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.send_signal(signal.SIGTERM)
    status, _, errors = ended(process)
    assert status == 75
    assert "[stopped] SIGTERM before the other machines came" in errors


@pytest.mark.parametrize(("host", "port"), [("", "29500"), ("head", ""), ("head", "http"), ("head", "70000")])
def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, host: str, port: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match="rendezvous-address"):
        rendezvous.address()


def work(run: str) -> rendezvous.Job:
    return rendezvous.Job(run, "stages.train", [], ".", None, 2, 2)


def test_a_taken_port_is_said(meeting_point: None) -> None:
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))), pytest.raises(MachineError, match="rendezvous-address"):
        rendezvous.Rendezvous(work("a"))


def test_one_machine_too_many_waits_for_the_next(meeting_point: None) -> None:
    meeting = rendezvous.Rendezvous(work("a"))
    assert (found := rendezvous.next_job(None, 10, lambda: False)) is not None
    assert found[1:] == (work("a"), 1)
    with pytest.raises(MachineError, match="rendezvous-timeout"):
        rendezvous.next_job(None, 1, lambda: False)
    assert meeting.wait_for_machines(lambda: False)
    assert meeting.store.add("machines", 0) == 1


@pytest.mark.parametrize("text", ["5m", "nan", "-1", "inf"])
def test_a_time_that_is_none_is_refused(meeting_point: None, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QLORA_RENDEZVOUS_SECONDS", text)
    with pytest.raises(InputError, match="is no number of seconds above 0"):
        rendezvous.Rendezvous(work("a"))


def test_a_machine_takes_part_once(meeting_point: None) -> None:
    meeting = rendezvous.Rendezvous(work("a"))
    with pytest.raises(MachineError, match="rendezvous-timeout"):
        rendezvous.next_job("a", 1, lambda: False)
    assert meeting.store.add("machines", 0) == 0
