"""Rows cleaned as tasks of Ray: the bytes and messages of the local engine, nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora import params
from qlora.core.errors import InputError, MachineError
from qlora.data.ray_workers import ray_engine
from qlora.data.readers import BATCH_ROWS
from qlora.data.workers import Engine
from stages.prepare import prepare


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    values = params.load(Path("params.yaml"))
    values = values.model_copy(update={"runtime": values.runtime.model_copy(update={"engine": "ray"})})
    with pytest.raises(MachineError, match=r"^\[ray-missing\] runtime.engine: ray .*pip install -r requirements-ray.txt") as caught:
        prepare(values, prepared=tmp_path, report=tmp_path / "prepare.json", notes=tmp_path)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_requirements_of_ray_leave_those_of_the_stages_alone() -> None:
    """Every stage refuses other versions than those of requirements.txt."""
    pinned = {line.partition("==")[0] for line in Path("requirements.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    own = [line for line in Path("requirements-ray.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert own[0] == "-r requirements.txt"
    assert all("==" in line for line in own[1:])
    assert not pinned & {line.partition("==")[0] for line in own[1:]}


def of_this_process() -> set[int]:
    import psutil

    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture
def engine() -> Iterator[Engine]:
    # One that this process began itself, such as multiprocessing's.
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as own:
        before = of_this_process()
        with ray_engine(2) as made:
            yield made
        assert own.pid in of_this_process() <= before
        assert own.poll() is None, "it was ended with Ray"
        own.communicate()


def numbers(share: int, shares: int) -> Iterator[int]:
    yield from range(share, 50, shares)


def refusing(share: int, shares: int) -> Iterator[int]:
    for number in range(share, 10, shares):
        if number == 5:
            raise InputError("data-invalid", "row 5 is wrong")
        yield number


def dying(share: int, shares: int) -> Iterator[int]:
    yield share
    os.kill(os.getpid(), signal.SIGKILL)


def ahead(marks: Path, share: int, shares: int) -> Iterator[int]:
    for number in range(share, 100, shares):
        (marks / str(number)).touch()
        yield number


class TestRay:
    def test_the_items_come_in_their_order(self, engine: Engine) -> None:
        assert list(engine(numbers, divisible=True)) == list(range(50))
        assert list(engine(numbers, divisible=False)) == list(range(50))

    def test_an_error_comes_when_its_turn_comes(self, engine: Engine) -> None:
        seen: list[int] = []
        with pytest.raises(InputError, match=r"^\[data-invalid\] row 5 is wrong$"):
            seen.extend(engine(refusing, divisible=True))
        assert seen == [0, 1, 2, 3, 4]

    def test_a_task_that_was_killed_is_named(self, engine: Engine) -> None:
        with pytest.raises(MachineError, match=r"\[worker-died\] task [12] of 2 .*Lower runtime.num_workers"):
            list(engine(dying, divisible=True))

    def test_an_item_whose_owner_died_before_it_was_waited_for_is_that_task_s(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        def lost(*_: Any, **__: Any) -> Any:
            raise ValueError("An application is trying to access a Ray object whose owner is unknown")

        monkeypatch.setattr(ray, "wait", lost)
        with pytest.raises(MachineError, match=r"\[worker-died\] task 1 of 2 .*owner is unknown"):
            list(engine(numbers, divisible=True))

    def test_tasks_are_only_a_few_items_ahead(self, engine: Engine, tmp_path: Path) -> None:
        from functools import partial

        items = engine(partial(ahead, tmp_path), divisible=True)
        next(items)
        time.sleep(1)
        assert len(list(tmp_path.iterdir())) < 10
        assert [1, *items][-1] == 99


def rows(count: int) -> list[dict[str, Any]]:
    def row(number: int) -> dict[str, Any]:
        roles = ["user"] if number % 100 == 7 else ["user", "assistant"]
        return {"messages": [{"content": f"{role} \u00e9 {number % 3000}", "role": role} for role in roles], "category": "c"}

    return [row(number) for number in range(count)]


def arguments(tmp_path: Path, name: str, engine: str) -> dict[str, Any]:
    return {"data": {"train_file": str(tmp_path / name), "test_file": str(tmp_path / name)}, "runtime": {"engine": engine, "num_workers": 2}}


def prepared(tmp_path: Path, name: str, engine: str, **changes: Any) -> list[bytes]:
    values = params.load(Path("params.yaml"))
    changed = arguments(tmp_path, name, engine)
    data = values.data.model_copy(update={**changed["data"], **changes})
    runtime = values.runtime.model_copy(update=changed["runtime"])
    folder = tmp_path / engine
    prepare(values.model_copy(update={"data": data, "runtime": runtime}), prepared=folder, report=folder / "prepare.json", notes=tmp_path / "notes")
    return [file.read_bytes() for file in sorted(folder.iterdir())]


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_both_engines_write_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    made = rows(3 * BATCH_ROWS + 5)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    else:
        (tmp_path / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    one, other = (prepared(tmp_path, f"rows.{suffix}", engine) for engine in ("local", "ray"))
    assert one == other
    assert len(one) == 4


def test_both_engines_refuse_with_the_same_message(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(3 * BATCH_ROWS)), tmp_path / "rows.parquet")
    messages = []
    for engine in ("local", "ray"):
        with pytest.raises(InputError) as caught:
            prepared(tmp_path, "rows.parquet", engine, on_invalid="error")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "row 8: no_final_answer" in messages[0]


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-port")
    with pytest.raises(MachineError, match=r"\[ray-unreachable\] Ray at no-port can't be used") as caught, ray_engine(2):
        pass
    assert caught.value.exit_code == 3


PROGRAM = """
import json, sys
from pathlib import Path
from qlora.runtime import command
from qlora import params
from stages.prepare import prepare
def main():
    values, changed = params.load(Path("params.yaml")), json.loads(sys.argv[1])
    sections = {name: getattr(values, name).model_copy(update=update) for name, update in changed.items()}
    folder = Path(sys.argv[2])
    prepare(values.model_copy(update=sections), prepared=folder, report=folder / "report.json", notes=folder.parent / "notes")
command.run(main)
"""


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 2.0), (signal.SIGINT, 6.0)])
def test_a_signal_stops_the_stage_and_its_ray(tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    """While Ray begins, and later."""
    import psutil

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(1000)) * 500, encoding="utf-8")
    asked = [sys.executable, "-c", PROGRAM, json.dumps(arguments(tmp_path, "rows.jsonl", "ray")), str(tmp_path / "prepared")]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as stage:
        time.sleep(seconds)
        begun = psutil.Process(stage.pid).children(recursive=True)
        stage.send_signal(number)
        _, said = stage.communicate(timeout=60)
    assert (stage.returncode, said.strip()) == (75, f"stopped: [stopped] {number.name}: nothing was written, run again")
    assert begun
    _, alive = psutil.wait_procs(begun, timeout=10)
    assert alive == []
    assert not list(tmp_path.glob("prepared/*"))
