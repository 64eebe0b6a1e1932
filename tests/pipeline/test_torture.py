"""Kills at random moments, the micro form of `make torture`, which does hundreds (benchmarks/results/torture.jsonl)."""

import json
import shutil
import time
from pathlib import Path

import pytest

from benchmarks.torture import Reference, torture, unrun
from tests.pipeline.clone import Clone


@pytest.mark.slow
def test_a_kill_changes_nothing(whole_training: Clone, tmp_path: Path) -> None:
    """An experiment that is killed once."""
    pristine = unrun(tmp_path / "pristine")
    shutil.copytree(whole_training.path, tmp_path / "whole", symlinks=True)
    whole = Clone(tmp_path / "whole")
    began = time.monotonic()
    assert whole.repro() == {"predict", "evaluate"}
    # All five stages take three times as long: when a kill may come depends on it, nothing else.
    seconds = 3 * (time.monotonic() - began)
    made = {"32-bit": Reference(pristine.path, whole.outputs(), (whole.path / "dvc.lock").read_bytes(), seconds)}
    results = tmp_path / "torture.jsonl"
    counts = torture(kills=1, minutes=10, seed=4, jobs=1, results=results, made=made, kills_a_trial=1)
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [record["ended"] for record in records if record["ended"] != "same bytes"] == []
    assert records[0]["command"] == "dvc exp run"
    assert counts["kills"] >= 1
    # Counted on, not run again.
    again = torture(kills=1, minutes=0, seed=4, jobs=1, results=results, made=made)
    assert again == counts
