"""Three kills at random moments, the micro form of `make torture`, which does hundreds (benchmarks/results/torture.jsonl)."""

import json
from pathlib import Path

import pytest

from benchmarks.torture import torture


@pytest.mark.slow
def test_two_kills_change_nothing(tmp_path: Path) -> None:
    results = tmp_path / "torture.jsonl"
    counts = torture(kills=2, minutes=10, seed=2, jobs=2, results=results, settings=["32-bit"])
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [record["ended"] for record in records if record["ended"] != "same bytes"] == []
    assert counts["kills"] >= 2
    # Counted on, not run again.
    again = torture(kills=2, minutes=0, seed=2, jobs=2, results=results, settings=["32-bit"])
    assert again == counts
