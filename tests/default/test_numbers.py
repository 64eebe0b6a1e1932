"""What the embedded default must show: read from what the last `dvc repro` here wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora import params
from qlora.core.files import read_points
from qlora.scoring.measures import MEASURES

ROOT = Path(__file__).parents[2]


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return record


@pytest.fixture(params=["base", "tuned"])
def scores(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = read("reports/evaluation.json")[request.param]
    return found


def test_the_base_model_does_not_know_the_chat_form() -> None:
    assert read("reports/evaluation.json")["base"]["exact_match"] <= 0.05


def test_the_tuned_model_answers_in_every_category() -> None:
    tuned = read("reports/evaluation.json")["tuned"]
    assert tuned["exact_match"] >= 0.80
    assert {category: row["exact_match"] for category, row in tuned["by_category"].items() if row["exact_match"] < 0.6} == {}
    assert tuned["stop_rate"] >= 0.95


def test_every_score_is_there(scores: dict[str, Any]) -> None:
    for row in (scores, *scores["by_category"].values()):
        assert set(MEASURES) <= set(row)
    assert scores["counts"]["turns"] == sum(row["turns"] for row in scores["by_category"].values())


def test_the_headline_is_that_of_the_tuned_model_at_the_published_step() -> None:
    headline, tuned = read("metrics/evaluate.json"), read("reports/evaluation.json")["tuned"]
    assert list(headline) == params.load(ROOT / "params.yaml").evaluate.headline
    published = dict(read_points(ROOT / "metrics" / "eval_loss.csv"))[read("reports/train.json")["published_step"]]
    assert headline == {name: tuned.get(name, published) for name in headline}
    assert all(isinstance(value, float) for value in headline.values())


def test_the_differences_are_tuned_minus_base() -> None:
    report = read("reports/evaluation.json")
    base, tuned = report["base"], report["tuned"]
    assert set(report["difference"]) == set(MEASURES)
    for name, difference in report["difference"].items():
        assert (difference["delta"] is None) == (base[name] is None or tuned[name] is None), name
        if difference["delta"] is not None:
            assert difference["delta"] == pytest.approx(tuned[name] - base[name])
            assert difference["low"] <= difference["delta"] <= difference["high"]
    known = {name for name, difference in report["difference"].items() if difference["delta"] is not None}
    assert {"nll", "exact_match", "rouge_l", "chrf"} <= known


def test_the_numbers_are_those_of_the_committed_params() -> None:
    prepared, trained = read("reports/prepare.json"), read("reports/train.json")
    assert prepared["train"]["rows_in"] + prepared["validation"]["rows_in"] == 2258
    assert prepared["test"]["rows_out"] == 224
    for split, least_fill in (("train", 0.95), ("validation", 0.8)):
        conversations = trained[split]["conversations"]
        assert conversations["in"] == conversations["out"] == prepared[split]["rows_out"]
        assert trained[split]["end_of_turn_per_answer"] == 1.0
        assert least_fill < trained[split]["rows"]["fill"] <= 1
