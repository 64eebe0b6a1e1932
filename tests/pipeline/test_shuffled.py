"""The embedded default measures learning: an adapter trained on shuffled answers must fail where the default succeeds."""

import json
import random
from pathlib import Path

import pytest

from tests.pipeline.clone import Clone, new_clone, tiny_rows


@pytest.mark.slow
def test_an_adapter_trained_on_shuffled_answers_stays_under_a_fifth(tmp_path: Path) -> None:
    rows = [row for row in tiny_rows("train", 10_000) if row["category"] != "broken"]
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    random.Random(0).shuffle(answers)
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = answers.pop()
    clone: Clone = new_clone(tmp_path, None, {"data/raw/shuffled/train.jsonl": rows})
    clone.set(data__train_file="data/raw/shuffled/train.jsonl")
    assert clone.repro() == {"prepare", "baseline", "train", "evaluate"}
    tuned = json.loads((clone.path / "metrics/evaluate.json").read_text(encoding="utf-8"))
    assert tuned["exact_match"] < 0.2
    assert tuned["stop_rate"] > 0.9, "it did learn the form of a chat"
