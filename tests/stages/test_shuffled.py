"""The embedded data measure learning: an adapter trained on shuffled answers fails where one of the true answers succeeds.

The micro form of benchmarks/shuffled.py, which trains on all kinds of questions and has `tools.compare` tell the two apart.
"""

import json
from pathlib import Path

import pytest

from benchmarks.shuffled import with_shuffled_answers
from qlora import params
from qlora.core.files import write_jsonl
from stages.evaluate import evaluate
from stages.predict import predict
from stages.prepare import prepare
from stages.train import train
from tests.pipeline.clone import tiny_rows
from tests.unit.trainings import changed

EASY = ("compare", "letter")
"""Kinds of questions that are learned within a few updates, with short answers."""


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_adapter_trained_on_shuffled_answers_stays_under_a_fifth(shuffled: bool, tmp_path: Path) -> None:
    kinds = {split: [[row for row in tiny_rows(split, 10_000) if row["category"] == kind] for kind in EASY] for split in ("train", "test")}
    if shuffled:
        # Within each kind: what an answer looks like is learned as soon as of true ones.
        kinds["train"] = [with_shuffled_answers(rows) for rows in kinds["train"]]
    for split, rows_by_kind in kinds.items():
        write_jsonl(tmp_path / f"{split}.jsonl", [row for rows in rows_by_kind for row in rows])
    values = changed(
        params.load(Path("params.yaml")),
        data__train_file=str(tmp_path / "train.jsonl"),
        data__test_file=str(tmp_path / "test.jsonl"),
        train__batch_size=1,
        train__learning_rate=3e-3,
        train__max_steps=50,
        train__warmup_steps=10,
        train__eval_strategy="no",
        hardware__per_device_train_batch_size=1,
        hardware__num_threads=1,
        runtime__progress=False,
    )
    metrics, manifests, adapter = tmp_path / "metrics", Path("models/base"), tmp_path / "adapter"
    split = {name: tmp_path / "prepared" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    prepare(values, prepared=tmp_path / "prepared", report=tmp_path / "prepare.json", notes=metrics)
    train(
        values,
        train=split["train"],
        validation=split["validation"],
        manifests=manifests,
        adapter_folder=adapter,
        report=tmp_path / "train.json",
        metrics=metrics,
        notes=metrics,
    )
    answers = tmp_path / "predictions"
    predict(values, test=split["test"], manifests=manifests, predictions=answers / "tuned.jsonl", notes=metrics, adapter_folder=adapter)
    # Only the tuned model's scores are read: its answers stand in for the base model's.
    for path in list(answers.iterdir()):
        path.with_name(path.name.replace("tuned", "base")).write_bytes(path.read_bytes())
    evaluate(
        values,
        test=split["test"],
        predictions=answers,
        train_report=tmp_path / "train.json",
        metrics=metrics,
        report=tmp_path / "evaluation.json",
        page=tmp_path / "report.html",
        notes=metrics,
    )
    tuned = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["tuned"]
    assert tuned["stop_rate"] > 0.9, "it did learn the form of a chat"
    assert tuned["exact_match"] < 0.2 if shuffled else tuned["exact_match"] > 0.5
