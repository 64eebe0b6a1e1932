"""The embedded default measures learning: an adapter trained on shuffled answers must fail where the default succeeds, and be called worse."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import verdicts
from tests.pipeline.clone import Clone, new_clone, tiny_rows

TINY = "data/raw/tiny/train-00000-of-00001.parquet"
SHUFFLED = "data/raw/shuffled/train.jsonl"
STEPS = 130


@pytest.mark.slow
def test_an_adapter_trained_on_shuffled_answers_stays_under_a_fifth_and_is_worse(tmp_path: Path) -> None:
    rows = [row for row in tiny_rows("train", 10_000) if row["category"] != "broken"]
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    random.Random(0).shuffle(answers)
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = answers.pop()
    clone: Clone = new_clone(tmp_path, None, {SHUFFLED: rows})
    # A third of the default's updates.
    clone.set(data__train_file=SHUFFLED, train__max_steps=STEPS)
    assert clone.repro() == {"prepare", "baseline", "train", "predict", "evaluate"}
    tuned: Any = clone.json("metrics/evaluate.json")
    assert tuned["exact_match"] < 0.2
    assert tuned["stop_rate"] > 0.9, "it did learn the form of a chat"
    clone.commit("shuffled")
    clone.run("git", "tag", "shuffled")

    clone.run("dvc", "exp", "run", "-S", f"data.train_file={TINY}", "--name", "fast")
    against_shuffled = clone.run("python", "-m", "tools.compare", "fast", "shuffled", "--fail-if-worse", "exact_match", fails=True)
    assert "worse: exact_match" in against_shuffled
    found = verdicts(against_shuffled)
    assert {found[name] for name in ("nll", "bits_per_byte")} == {"worse"}
    found = verdicts(clone.run("python", "-m", "tools.compare", "shuffled", "fast"))
    assert {found[name] for name in ("nll", "exact_match", "rouge_l", "chrf")} == {"better"}
    # Answers learned from shuffled ones may hold no 4-gram at all: BLEU has no row to read a verdict from, then.
    assert found.get("bleu", "better") == "better"
