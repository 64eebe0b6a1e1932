"""Several processes give what one gives, in its order, and none outlives its reader."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from qlora.core.errors import InputError, MachineError
from qlora.data.workers import available_processes, interleaved


def numbers(count: int, share: int, shares: int) -> Iterator[int]:
    yield from range(share, count, shares)


def process_ids(share: int, shares: int) -> Iterator[int]:
    while True:
        yield os.getpid()


def refusing(share: int, shares: int) -> Iterator[int]:
    for number in numbers(10, share, shares):
        if number == 5:
            raise InputError("data-invalid", "row 5 is wrong")
        yield number


def buggy(share: int, shares: int) -> Iterator[int]:
    yield from numbers(3, share, shares)
    raise KeyError(share)


def dying(share: int, shares: int) -> Iterator[int]:
    yield from numbers(4, share, shares)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 50])
def test_the_items_and_their_order_do_not_depend_on_the_processes(processes: int, count: int) -> None:
    assert list(interleaved(partial(numbers, count), processes)) == list(range(count))


def test_the_work_is_done_elsewhere() -> None:
    items = interleaved(process_ids, 2)
    found = {next(items) for _ in range(4)}
    assert len(found) == 2
    assert os.getpid() not in found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_error_comes_when_its_turn_comes(processes: int) -> None:
    seen = []
    with pytest.raises(InputError, match=r"^\[data-invalid\] row 5 is wrong$") as caught:
        seen.extend(interleaved(refusing, processes))
    assert caught.value.exit_code == 2
    items = interleaved(refusing, processes)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_bug_keeps_the_traceback_of_its_process() -> None:
    with pytest.raises(KeyError) as caught:
        list(interleaved(buggy, 2))
    assert any("in buggy" in note for note in caught.value.__notes__)


def test_a_killed_process_is_named() -> None:
    with pytest.raises(MachineError, match=r"\[worker-died\] process 1 of 2 ended with exit code -9 .* Lower runtime.num_workers"):
        list(interleaved(dying, 2))


def test_processes_end_with_their_reader() -> None:
    items = interleaved(process_ids, 2)
    workers = {next(items) for _ in range(4)}
    items.close()  # type: ignore[attr-defined]
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_processes_end_when_their_reader_is_killed() -> None:
    reading, writing = os.pipe()
    reader = os.fork()
    if reader == 0:
        items = interleaved(process_ids, 2)
        os.write(writing, " ".join(str(next(items)) for _ in range(2)).encode())
        signal.pause()
    workers = os.read(reading, 100).decode().split()
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    give_up = time.monotonic() + 10
    while any(running(worker) for worker in workers):
        assert time.monotonic() < give_up, f"processes {workers} go on without a reader"
        time.sleep(0.01)
    os.close(reading)
    os.close(writing)


def running(process: str) -> bool:
    """A zombie that nobody waits for does not run any more."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_per_core_when_none_is_asked_for() -> None:
    assert available_processes(None) == len(os.sched_getaffinity(0))
    assert available_processes(3) == 3


def refusing_at_once(share: int, shares: int) -> Iterator[int]:
    if share == 0:
        raise InputError("data-damaged", "the first file is damaged")
    yield share


def complain(*_: object) -> None:
    raise ValueError("a handler of the reader ran in its worker")


def refused_many_times() -> None:
    """A program of its own for the test below: processes forked from a small one begin, and end, sooner."""
    signal.signal(signal.SIGTERM, complain)
    for _ in range(60):
        with pytest.raises(InputError, match="the first file is damaged"):
            list(interleaved(refusing_at_once, 6))
    print("refused")


def test_processes_that_have_hardly_begun_end_in_silence() -> None:
    """They inherit what their reader does on a signal, and would say so."""
    program = "from tests.unit.test_workers import refused_many_times; refused_many_times()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")
