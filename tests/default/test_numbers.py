"""What the embedded default must show: read from the metrics that the last `dvc repro` here wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.measures import MEASURES

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["baseline", "evaluate"])
def metrics(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "metrics" / f"{name}.json").read_text(encoding="utf-8"))
    return record


def test_the_base_model_does_not_know_the_chat_form() -> None:
    assert read("baseline")["exact_match"] <= 0.05


def test_the_tuned_model_answers_in_every_category() -> None:
    tuned = read("evaluate")
    assert tuned["exact_match"] >= 0.80
    assert {category: row["exact_match"] for category, row in tuned["by_category"].items() if row["exact_match"] < 0.6} == {}
    assert tuned["stop_rate"] >= 0.95


def test_every_metric_is_there(metrics: dict[str, Any]) -> None:
    for row in (metrics, *metrics["by_category"].values()):
        assert set(MEASURES) <= set(row)
    assert metrics["counts"]["turns"] == sum(row["turns"] for row in metrics["by_category"].values())


def test_the_differences_are_tuned_minus_base() -> None:
    base, tuned = read("baseline"), read("evaluate")
    assert set(tuned["delta"]) == set(MEASURES)
    for name, difference in tuned["delta"].items():
        assert difference["delta"] == pytest.approx(tuned[name] - base[name])
        assert difference["low"] <= difference["delta"] <= difference["high"]


def test_the_metrics_are_those_of_the_committed_params() -> None:
    prepared = read("prepare")
    assert prepared["train"]["rows_in"] + prepared["validation"]["rows_in"] == 2258
    assert prepared["test"]["rows_out"] == 224
    for split, least_fill in (("train", 0.95), ("validation", 0.8)):
        trained = read("train")[split]
        assert trained["conversations"]["in"] == trained["conversations"]["out"] == prepared[split]["rows_out"]
        assert trained["end_of_turn_per_answer"] == 1.0
        assert least_fill < trained["rows"]["fill"] <= 1
