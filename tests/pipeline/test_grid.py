"""A grid of experiments with two workers: each stage on a GPU of its own, all of them recorded, ranked, and applied in another clone."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ended_queue, overlapping, queue_tasks, start_queue
from tests.pipeline.clone import Clone

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_grid_by_two_workers(built: Clone, tmp_path: Path) -> None:
    """One test: two processes of a test run would build the grid twice, or wait for each other."""
    grid = grid_of_two(built, tmp_path / "weights")
    require_one_stage_at_a_time_on_a_gpu(grid)
    require_ranked_results(grid)
    require_that_another_clone_applies_one_and_runs_nothing(grid, tmp_path)


def grid_of_two(clone: Clone, weights: Path) -> Clone:
    """The built clone with two pretended GPUs and its base model behind a link that Git ignores, in which a grid of two ran."""
    with (clone.path / "qlora/runtime/launcher.py").open("a", encoding="utf-8") as file:
        file.write((HERE / "pretended_gpus.txt").read_text(encoding="utf-8"))
    clone.environment.update(CUDA_VISIBLE_DEVICES="GPU-5a,GPU-7b")
    model = clone.path / "models/base/tiny"
    shutil.move(model, weights)
    model.symlink_to(weights, target_is_directory=True)
    clone.run("git", "rm", "--quiet", "-r", "--cached", "models/base/tiny")
    clone.commit("two GPUs, and weights elsewhere")
    assert clone.run("git", "ls-files", "models/base/tiny") == "", "copies of the workspace have neither weights nor link"
    assert clone.changed() == {}
    clone.run("dvc", "exp", "run", "--queue", "-S", "train.learning_rate=0.001,0.004", "-S", "lora.r=4")
    assert queue_tasks(clone) == ["Queued"] * 2
    start_queue(clone, 2)
    assert ended_queue(clone) == ["Success"] * 2
    return clone


def experiments(clone: Clone) -> dict[str, dict[str, Any]]:
    """What `dvc exp show` knows of each, by name."""
    shown = json.loads(clone.run("dvc", "exp", "show", "--json"))
    return {entry["name"]: entry["revs"][0]["data"] for entry in shown[1]["experiments"]}


def require_one_stage_at_a_time_on_a_gpu(grid: Clone) -> None:
    log = grid.path / ".dvc/tmp/intervals"
    intervals = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    assert sorted(module for *_, module in intervals) == ["stages.predict"] * 2 + ["stages.train"] * 2
    assert overlapping(log) == []
    assert {name for _, _, name, _ in intervals} == {"GPU-5a", "GPU-7b"}
    pairs = itertools.combinations([(float(began), float(ended)) for began, ended, *_ in intervals], 2)
    assert any(one[0] < other[1] and other[0] < one[1] for one, other in pairs), "the two workers never worked at the same time"


def require_ranked_results(grid: Clone) -> None:
    assert grid.run("git", "status", "--porcelain") == "", "a queue leaves the workspace alone"
    assert len(list((grid.path / ".dvc/tmp/throughput").glob("*.json"))) == 2, "the times of all runs are kept"
    found = experiments(grid)
    assert len({data["outs"]["models/adapter"]["hash"] for data in found.values()}) == 2
    rows = [line.split() for line in grid.run("python", "-m", "tools.compare", "--all", "--score", "nll").splitlines()[1:4]]
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    changed = {row[0]: set(row[-2:]) for row in rows if row[0] != "HEAD"}
    assert changed.keys() == found.keys()
    assert sorted(map(sorted, changed.values())) == [["lora.r=4", f"train.learning_rate={rate}"] for rate in ("0.001", "0.004")]
    nll = {name: data["metrics"]["metrics/evaluate.json"]["data"]["nll"] for name, data in found.items()}
    assert {row[0]: row[1] for row in rows if row[0] != "HEAD"} == {name: f"{value:.4f}" for name, value in nll.items()}


def require_that_another_clone_applies_one_and_runs_nothing(grid: Clone, tmp_path: Path) -> None:
    found = experiments(grid)
    name = min(found)
    grid.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(tmp_path / "git"))
    two = Clone(tmp_path / "two", {**grid.environment})
    grid.run("git", "push", "--quiet", str(tmp_path / "git"), "main")
    grid.run("git", "remote", "add", "origin", f"file://{tmp_path / 'git'}")
    grid.run("git", "clone", "--quiet", f"file://{tmp_path / 'git'}", str(two.path))
    for clone in (grid, two):
        clone.run("dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    grid.run("dvc", "exp", "push", "origin", name)
    assert name in two.run("dvc", "exp", "list", "origin", "--all-commits")
    two.run("dvc", "exp", "pull", "origin", name)
    two.run("dvc", "exp", "apply", name)
    two.run("dvc", "pull")
    assert two.repro() == set()
    assert "up to date" in two.run("dvc", "status")
    assert experiments(two)[name]["outs"] == found[name]["outs"]
    rank = found[name]["params"]["params.yaml"]["data"]["lora"]["r"]
    assert two.json("models/adapter/adapter_config.json")["r"] == rank
    two.run("git", "stash", "--quiet", "--include-untracked")
    two.run("dvc", "exp", "branch", name, "chosen")
    assert f"\n  r: {rank}\n" in two.run("git", "show", "chosen:params.yaml")
