"""A grid of experiments with two workers: each stage on a GPU of its own, all of them recorded, ranked, applied elsewhere."""

import itertools
import json
import subprocess
import time
from pathlib import Path

from tests.pipeline.clone import Clone, new_clone, tiny_rows
from tests.unit.test_gpus import overlapping

HERE = Path(__file__).parent


def started(clone: Clone, *command: str) -> None:
    """A worker holds the streams that it is given until it ends."""
    subprocess.run(command, cwd=clone.path, env=clone.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def tasks(clone: Clone) -> list[str]:
    """The state of each task of the queue."""
    listed = clone.run("dvc", "queue", "status").splitlines()
    return [line.split()[-1] for line in listed if line[:7].isalnum() and len(line.split()) > 2 and not line.startswith("Task")]


def wait_for_queue(clone: Clone, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (states := tasks(clone)) and {"Running", "Queued"} & set(states):
        assert time.monotonic() < deadline, states
        time.sleep(1)
    return states


def test_a_grid_with_two_workers(tmp_path: Path) -> None:
    raw = {"data/raw/micro/train.jsonl": tiny_rows("train", 60), "data/raw/micro/test.jsonl": tiny_rows("test", 14)}
    clone = new_clone(tmp_path / "clone", HERE / "micro.yaml", raw)
    with (clone.path / "qlora/launch.py").open("a", encoding="utf-8") as file:
        file.write((HERE / "pretended_gpus.txt").read_text(encoding="utf-8"))
    clone.set(hardware__device="cuda", train__num_train_epochs=1, train__max_steps=2)
    clone.environment.update(CUDA_VISIBLE_DEVICES="GPU-5a,GPU-7b")
    clone.repro()
    clone.commit("built")

    clone.run("dvc", "exp", "run", "--queue", "-S", "train.learning_rate=0.001,0.004", "-S", "lora.r=4,8")
    assert tasks(clone) == ["Queued"] * 4
    started(clone, "dvc", "queue", "start", "--jobs", "2")
    assert wait_for_queue(clone, 400) == ["Success"] * 4
    assert clone.run("git", "status", "--porcelain") == ""

    intervals = [line.split() for line in (clone.path / ".dvc/tmp/intervals").read_text(encoding="utf-8").splitlines()]
    assert sorted(module for *_, module in intervals) == ["stages.baseline"] + ["stages.evaluate"] * 5 + ["stages.train"] * 5
    assert overlapping(clone.path / ".dvc/tmp/intervals") == []
    assert {name for _, _, name, _ in intervals} == {"GPU-5a", "GPU-7b"}
    queued = [line for line in intervals if line[3] == "stages.train"][1:]
    assert [1 for one, other in itertools.combinations(queued, 2) if float(one[0]) < float(other[1]) and float(other[0]) < float(one[1])]

    shown = json.loads(clone.run("dvc", "exp", "show", "--json"))
    experiments = {entry["name"]: entry["revs"][0]["data"] for entry in shown[1]["experiments"]}
    adapters = {data["outs"]["models/adapter"]["hash"] for data in experiments.values()}
    assert len(adapters) == 4
    ranked = clone.run("python", "-m", "tools.compare", "--all", "--score", "nll").splitlines()
    rows = [line.split() for line in ranked[1:6]]
    assert {row[0] for row in rows} == {"HEAD", *experiments}
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    assert {" ".join(row[-2:]) for row in rows if row[0] != "HEAD"} == {
        f"lora.r={rank} train.learning_rate={rate}" for rate, rank in itertools.product(("0.001", "0.004"), ("4", "8"))
    }
    nlls = {name: data["metrics"]["metrics/evaluate.json"]["data"]["nll"] for name, data in experiments.items()}
    assert all(f"{nlls[row[0]]:.4f}" == row[1] for row in rows if row[0] != "HEAD")
