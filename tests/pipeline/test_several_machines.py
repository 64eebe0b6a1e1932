"""A stage by processes on two machines, which are two nodes of a Ray cluster on this one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.torture import processes
from qlora import params
from qlora.core.errors import MachineError
from qlora.params.hardware import HardwareParams
from qlora.runtime import ray_launcher
from qlora.runtime.ray_actor import first_missing
from tests.pipeline.clone import ROOT, Clone
from tests.pipeline.interrupting import checkpoint, log, ranks, started, wait_for

NODE = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 * 2**20}
"""Ray counts GPUs as it is told to; a stage on the CPU asks for none."""
SETTINGS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4, "worker_niceness": 0}
"""A lost node is noticed soon, and the tests beside these are served no sooner."""
ACTION = "tests.unit.rank_program"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": SETTINGS})
    try:
        made.add_node(**NODE)
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def address(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return str(cluster.address)


def launched(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.unit.cluster_program", "num_machines=2", "num_processes=2", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*arguments: str) -> tuple[int, str, str]:
    process = launched(*arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.fixture
def stopping(tmp_path: Path) -> tuple[tuple[str, ...], Callable[[], list[int]]]:
    """Arguments of two processes that wait for a signal, and a function that finds them: other tests run such processes too."""
    arguments = ("--", "stop", "-1", str(tmp_path))
    return arguments, lambda: processes(ROOT, f"-m {ACTION} {' '.join(arguments[1:])}")


def test_each_sees_the_gpus_of_its_machine(address: str, tmp_path: Path) -> None:
    assert ended("device=cuda", "num_processes=4", "--", "see", "-1", str(tmp_path), "0") == (0, "", "")
    assert [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(4)] == ["0,1"] * 4
    # A model whose layers are split answers from one process.
    (tmp_path / "0").unlink()
    assert ended("device=cuda", "num_processes=4", "count=1", "--", "see", "-1", str(tmp_path), "0") == (0, "", "")
    assert (tmp_path / "0").read_text(encoding="utf-8") == "0,1"


def test_what_one_alone_has_to_say_is_said_with_its_number(address: str) -> None:
    status, output, errors = ended("--", "fail", "1")
    assert status == 3
    assert output == ""
    assert re.fullmatch(r"process 1 of 2 on \S+:\n\nerror: \[disk-full\] no room for rank 1", errors.strip())


def test_a_signal_reaches_each_of_them(address: str, stopping: Any) -> None:
    arguments, found = stopping
    process = launched(*arguments)
    wait_for(lambda: len(found()) == 2)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # The other one, whose output is not shown, begins at the same time.
    time.sleep(1)
    # Which Ray blocks in its own processes.
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (75, "")
    assert found() == []


def test_a_killed_launcher_leaves_no_process(address: str, stopping: Any) -> None:
    arguments, found = stopping
    process = launched(*arguments)
    wait_for(lambda: len(found()) == 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not found(), 30)


def test_a_lost_machine_ends_the_others_in_one_message(address: str, cluster: Any, stopping: Any) -> None:
    arguments, found = stopping
    process = launched("GRACE_SECONDS=1", *arguments)
    wait_for(lambda: len(found()) == 2)
    (lost,) = cluster.worker_nodes
    cluster.remove_node(lost, allow_graceful=False)
    # For the tests that follow.
    cluster.add_node(**NODE)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    # Of a machine that is one in name only, the actor may live long enough to tell how its process ended.
    assert re.fullmatch(r"error: \[rank-died\] process [01] of 2 on \S+ was (lost, the others were ended|ended by SIGKILL).*", errors.strip())
    wait_for(lambda: not found(), 30)


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> HardwareParams:
    """Of two machines, for what is refused in this process."""
    monkeypatch.setattr(ray_launcher, "handle", lambda *_: None)
    return params.load(Path("params.yaml")).hardware.model_copy(update={"num_machines": 2, "num_processes": 2})


def test_a_cluster_that_is_too_small_is_described(address: str, hardware: HardwareParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_launcher, "PLACEMENT_SECONDS", 1.0)
    large = hardware.model_copy(update={"device": "cuda", "num_processes": 6})
    with pytest.raises(MachineError, match=r"^\[ray-too-small\] hardware.num_machines = 2 asks for 2 machine\(s\) with 3 GPU\(s\), ") as caught:
        ray_launcher.launch(ACTION, [], large, 6)
    assert caught.value.exit_code == 3
    assert caught.value.message.count("2 GPU(s), 2 CPU(s)") == 2


def test_machines_that_do_not_see_the_same_are_refused(address: str, hardware: HardwareParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MachineError, match=r"^\[ray-checkout\] \S+ does not see /nowhere/python of this machine") as caught:
        ray_launcher.launch(ACTION, [], hardware, 2)
    assert caught.value.exit_code == 3
    assert not list(Path(".dvc/tmp").glob("checkout-*"))


def test_another_checkout_at_the_same_path_is_seen(tmp_path: Path) -> None:
    written = tmp_path / "token"
    written.write_text("this one", encoding="utf-8")
    assert first_missing([str(written), str(tmp_path)], "this one") is None
    assert first_missing([str(written), str(tmp_path)], "another one") == str(written)
    assert first_missing([str(written), str(tmp_path / "absent")], "this one") == str(tmp_path / "absent")


def test_no_cluster_is_said(hardware: HardwareParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-port")
    with pytest.raises(MachineError, match=r"^\[ray-unreachable\] Ray at no-port can't be used: .*`ray start --head` on this machine"):
        ray_launcher.launch(ACTION, [], hardware, 2)


def test_without_ray_the_message_says_how_to_install_it(hardware: HardwareParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r"^\[ray-missing\] hardware.num_machines > 1 .*pip install -r requirements-ray.txt"):
        ray_launcher.launch(ACTION, [], hardware, 2)


@pytest.mark.parametrize(
    ("changes", "count", "expected"),
    [
        ({}, 2, (2, 1, 0)),
        ({"device": "cuda", "num_processes": 8}, 8, (2, 4, 1)),
        # A model whose layers are split answers from one process.
        ({"device": "cuda", "num_processes": 8, "strategy": "fsdp2"}, 1, (1, 1, 4)),
    ],
)
def test_each_process_has_a_gpu_and_one_alone_those_of_a_machine(
    hardware: HardwareParams, changes: dict[str, Any], count: int, expected: tuple[int, int, int]
) -> None:
    assert ray_launcher.layout(hardware.model_copy(update=changes), count) == expected


@pytest.mark.slow
def test_dvc_repro_makes_the_bytes_of_two_processes_of_one_machine(
    address: str, of_two_processes: tuple[Clone, dict[str, bytes]], answered_by_two: Clone, tmp_path: Path
) -> None:
    """Also where one of them, or what Ray runs for it, is killed in the middle."""
    before, expected = of_two_processes
    shutil.copytree(before.path, tmp_path / "clone", symlinks=True)
    clone = Clone(tmp_path / "clone")
    clone.environment["RAY_ADDRESS"] = address
    clone.set(hardware__num_machines=2)
    dvc = started(clone, "dvc", "repro", "train")
    wait_for(lambda: checkpoint(clone))
    _, second = ranks(clone.path, "-m stages.train")
    os.kill(psutil.Process(second).ppid(), signal.SIGKILL)
    assert dvc.wait(60) != 0
    assert log(clone).count("error: [") == log(clone).count("error: [rank-died] process 1 of 2 on ") == 1
    assert "Traceback" not in log(clone)
    wait_for(lambda: not processes(clone.path), 60)
    assert "resuming from checkpoint" in clone.run("dvc", "repro", "train")
    assert clone.outputs() == expected
    # The baseline is the same program.
    assert clone.repro("--single-item", "predict") == {"predict"}
    assert clone.outputs() == answered_by_two.outputs()
