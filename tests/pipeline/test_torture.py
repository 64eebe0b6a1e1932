"""Ten kills at random moments; `make torture` does hundreds."""

import json
from pathlib import Path

from benchmarks.torture import torture


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    results = tmp_path / "torture.jsonl"
    counts = torture(kills=10, minutes=15, seed=2, jobs=2, results=results)
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [record["ended"] for record in records if record["ended"] != "same bytes"] == []
    assert counts["kills"] >= 10
    # Counted on, not begun anew.
    again = torture(kills=10, minutes=0, seed=2, jobs=2, results=results)
    assert again == counts
