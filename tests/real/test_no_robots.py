"""Real rows, a real pretrained model and a real tokenizer through the real pipeline."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from qlora.scoring.measures import MEASURES
from tests.pipeline.clone import Clone, new_clone

RealData = Callable[[str], Path]
SETTINGS: dict[str, Any] = {
    "data__train_file": "data/raw/no_robots/train.jsonl",
    "data__test_file": "data/raw/no_robots/test.jsonl",
    "data__system_message": "You are helpful.",
    "base_model__name": "stories260K",
    "chat__template": "vicuna",
    "sequence__max_length": 512,
    "train__batch_size": 4,
    "train__num_train_epochs": 1,
    "train__max_steps": 6,
    "train__warmup_steps": 0,
    "train__logging_steps": 1,
    "predict__max_new_tokens": 16,
}


@pytest.fixture(scope="module")
def clone(real_data: RealData, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """450 rows to train, 50 to test; stories260K pinned where it lies, without a chat template, a pad token or more than 512 tokens."""
    rows = pq.read_table(real_data("no_robots_test.parquet"), columns=["prompt", "messages", "category"]).to_pylist()
    raw = {SETTINGS["data__train_file"]: rows[:450], SETTINGS["data__test_file"]: rows[450:]}
    made = new_clone(tmp_path_factory.mktemp("real"), None, raw)
    made.run("python", "-m", "tools.pin", "stories260K", "--path", str(real_data("stories260K")))
    made.set(**SETTINGS)
    made.commit("real input")
    assert made.repro() == {"prepare", "baseline", "train", "predict", "evaluate"}
    made.commit("built")
    return made


def test_every_row_is_accounted_for(clone: Clone) -> None:
    prepared: Any = clone.json("reports/prepare.json")
    assert prepared["train"]["rows_in"] + prepared["validation"]["rows_in"] == 450
    assert prepared["test"]["rows_in"] == 50
    trained: Any = clone.json("reports/train.json")
    for split in ("train", "validation"):
        assert prepared[split]["rows_in"] == prepared[split]["rows_out"] + sum(prepared[split]["dropped"].values())
        conversations = trained[split]["conversations"]
        assert conversations["in"] == prepared[split]["rows_out"] == conversations["out"] + sum(conversations["dropped"].values())
        assert trained[split]["end_of_turn_per_answer"] == 1.0
        # 42 % of the rows fit 512 tokens without a system message.
        assert 0.2 < conversations["out"] / conversations["in"] < 0.6


def test_the_adapter_moved_and_the_base_did_not(clone: Clone, real_data: RealData) -> None:
    weights = load_file(clone.path / "models/adapter/adapter_model.safetensors")
    assert all(tensor.any() for tensor in weights.values())
    assert {str(tensor.dtype) for tensor in weights.values()} == {"float32"}
    manifest: Any = clone.json("models/base/stories260K.json")
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((real_data("stories260K") / name).read_bytes()).hexdigest() == entry["sha256"]
    assert str(real_data("stories260K").parent) not in json.dumps(manifest)


def test_the_evaluation_is_complete(clone: Clone) -> None:
    report: Any = clone.json("reports/evaluation.json")
    evaluated, difference = report["tuned"], report["difference"]
    counts = evaluated["counts"]
    assert counts["conversations"] == 50
    assert 0 < counts["too_long"] < 50
    lines = [json.loads(line) for line in (clone.path / "data/predictions/tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == counts["turns"] == sum(row["turns"] for row in evaluated["by_category"].values())
    assert sum(line["tokens"] for line in lines) == counts["tokens"]
    assert difference["nll"]["high"] < 0, "six updates on stories make the next story likelier"
    assert set(difference) == set(MEASURES)
