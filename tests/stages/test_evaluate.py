"""What the stage writes, what it refuses, and that it leaves everything as it was then. No model answers here: predictions are written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import params
from qlora.core.errors import InputError
from qlora.core.files import write_csv, write_json, write_jsonl
from qlora.params import Params
from qlora.scoring.measures import MEASURES
from stages.evaluate import evaluate
from tests.unit.trainings import changed

COUNT = 14
"""Conversations; below 12 there is no verdict."""


def row(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Spell {number}."}, {"role": "assistant", "content": f"{number}-{number}"}]
    return {"id": str(number), "category": "even" if number % 2 == 0 else "odd", "messages": messages}


def prediction(number: int, answer: str | None) -> dict[str, Any]:
    identity = {"id": str(number), "turn": 0, "category": row(number)["category"], "seed": 0}
    answered = {"answer": None} if answer is None else {"answer": answer, "answer_tokens": 3, "stopped": True}
    return {**identity, "nll_sum": 6.0, "stop_nll": 1.0, "tokens": 4, "bytes": 3, **answered}


@pytest.fixture
def values() -> Params:
    return changed(params.load(Path("params.yaml")), evaluate__resamples=1000)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What the other stages would have made: the base model answers every second turn rightly, the tuned model all."""
    folder = tmp_path / "inputs"
    write_jsonl(folder / "test.jsonl", map(row, range(COUNT)))
    for side, right in (("base", 2), ("tuned", 1)):
        write_jsonl(folder / f"{side}.jsonl", [prediction(number, f"{number}-{number}" if number % right == 0 else "no") for number in range(COUNT)])
        write_json(folder / f"{side}_counts.json", {"conversations": COUNT, "not_chosen": 0, "control_token": 0, "too_long": 0})
    write_csv(folder / "metrics" / "train_loss.csv", ["step", "loss"], [(1, 2.5), (2, 2.0)])
    write_csv(folder / "metrics" / "eval_loss.csv", ["step", "loss"], [(1, 2.25), (2, 1.75)])
    write_json(folder / "train.json", {"published_step": 1})
    return folder


def score(values: Params, folder: Path) -> dict[str, Any]:
    """The headline and the report of all scores."""
    paths = {name: folder / place for name, place in {"test": "test.jsonl", "train_report": "train.json", "page": "report.html"}.items()}
    evaluate(values, predictions=folder, metrics=folder / "metrics", report=folder / "evaluation.json", notes=folder / "notes", **paths)
    read = {"headline": folder / "metrics" / "evaluate.json", "report": folder / "evaluation.json"}
    return {name: json.loads(path.read_bytes()) for name, path in read.items()}


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_headline_is_flat_and_the_report_holds_both_models_and_every_difference(inputs: Path, values: Params) -> None:
    found = score(values, inputs)
    # The validation loss of the published step, not the last or the lowest.
    assert list(found["headline"]) == values.evaluate.headline
    assert found["headline"] == {name: pytest.approx(found["report"]["tuned"].get(name, 2.25)) for name in values.evaluate.headline}
    assert set(found["report"]) == {"base", "tuned", "difference", "plot"}
    assert (found["report"]["base"]["exact_match"], found["report"]["tuned"]["exact_match"]) == (0.5, 1.0)
    for side in ("base", "tuned"):
        assert set(MEASURES) <= set(found["report"][side])
        assert {name: part["turns"] for name, part in found["report"][side]["by_category"].items()} == {"even": 7, "odd": 7}
    assert set(found["report"]["difference"]) == set(MEASURES)
    difference = found["report"]["difference"]["exact_match"]
    assert set(difference) == {"delta", "low", "high", "p_better"}
    assert difference["delta"] == 0.5
    assert 0 < difference["low"] < 0.5 < difference["high"]
    assert found["report"]["plot"][0] == {"category": "even", "exact_match": 1.0}
    assert "better" in (inputs / "report.html").read_text(encoding="utf-8")


def test_equal_predictions_are_no_difference(inputs: Path, values: Params) -> None:
    (inputs / "tuned.jsonl").write_bytes((inputs / "base.jsonl").read_bytes())
    found = score(values, inputs)
    assert {difference["delta"] for difference in found["report"]["difference"].values()} <= {0.0, None}
    assert "no difference shown" in (inputs / "report.html").read_text(encoding="utf-8")


def test_the_headline_says_which_metrics_there_are_and_what_was_not_validated_is_left_out(inputs: Path, values: Params) -> None:
    chosen = changed(values, evaluate__headline=["eval_loss", "chrf", "nll"])
    assert list(score(chosen, inputs)["headline"]) == ["eval_loss", "chrf", "nll"]
    write_csv(inputs / "metrics" / "eval_loss.csv", ["step", "loss"], [])
    assert list(score(chosen, inputs)["headline"]) == ["chrf", "nll"]


def test_a_score_that_is_not_defined_is_null(inputs: Path, values: Params) -> None:
    """No answer has four words in a row, so BLEU has no 4-gram to count."""
    for side in ("base", "tuned"):
        write_jsonl(inputs / f"{side}.jsonl", [prediction(number, "no") for number in range(COUNT)])
    found = score(changed(values, evaluate__headline=["bleu", "exact_match"]), inputs)
    assert found["headline"] == {"bleu": None, "exact_match": 0.0}
    assert found["report"]["difference"]["bleu"]["delta"] is None
    assert "not defined" in (inputs / "report.html").read_text(encoding="utf-8")


def test_a_category_can_not_steer_the_page_of_plots(inputs: Path, values: Params) -> None:
    """`dvc plots` writes the report's list into a script element."""
    hostile = "</script><script>alert(1)</script>"
    for side in ("base", "tuned"):
        write_jsonl(inputs / f"{side}.jsonl", [{**prediction(number, "no"), "category": hostile} for number in range(COUNT)])
    assert "<" not in json.dumps(score(values, inputs)["report"]["plot"])
    assert "alert(1)" in score(values, inputs)["report"]["plot"][0]["category"]


def other_test(folder: Path) -> None:
    write_jsonl(folder / "test.jsonl", [row(number + 1) for number in range(COUNT)])


def a_turn_less(folder: Path) -> None:
    write_jsonl(folder / "tuned.jsonl", [prediction(number, "no") for number in range(COUNT - 1)])


@pytest.mark.parametrize(("damage", "code"), [(other_test, "predictions-foreign"), (a_turn_less, "compare-unaligned")])
def test_bad_input_is_one_error_and_nothing_is_written(inputs: Path, values: Params, damage: Callable[[Path], None], code: str) -> None:
    damage(inputs)
    before = everything(inputs)
    with pytest.raises(InputError) as error:
        score(values, inputs)
    assert (error.value.code, error.value.exit_code) == (code, 2)
    assert everything(inputs) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics/train_loss.csv", b"step,loss\n1,\xcb\n"),
        ("metrics/eval_loss.csv", b"step,loss\n1\n"),
        ("train.json", b"{}"),
        ("tuned_counts.json", b"[1]"),
        ("base.jsonl", b"{"),
    ],
)
def test_what_no_stage_wrote_is_refused_with_one_message(values: Params, inputs: Path, name: str, content: bytes) -> None:
    (inputs / name).write_bytes(content)
    with pytest.raises(InputError, match="predictions-damaged"):
        score(values, inputs)


def test_it_ends_with_the_headline_of_both_models_and_what_to_do_next(inputs: Path, values: Params, capsys: pytest.CaptureFixture[str]) -> None:
    score(values, inputs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["base", "tuned", "difference", "95", "%", "interval", "p(better)"]
    assert [line.split()[0] for line in lines[1:5]] == ["exact_match", "rouge_l", "stop_rate", "nll"]
    assert lines[1].split()[1:4] == ["0.5000", "1.0000", "+0.5000"]
    assert lines[1].endswith("better")
    assert lines[5].startswith("validation loss 2.2500; ")
    assert f"{inputs / 'report.html'} (in a browser)" in lines[5]
    assert max(map(len, [*lines[:5], lines[5].replace(str(inputs / "report.html"), "reports/report.html")])) <= 120


def test_what_makes_the_numbers_doubtful_is_a_warning(inputs: Path, values: Params, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(inputs / "metrics" / "eval_loss.csv", ["step", "loss"], [(1, 1.5), (2, 1.75)])
    predictions = [{**prediction(number, "no"), "stopped": number == 0} for number in range(COUNT)]
    write_jsonl(inputs / "tuned.jsonl", predictions)
    score(values, inputs)
    assert [record.getMessage().split(":")[0] for record in caplog.records if record.name == "qlora.evaluate"] == [
        "the test set has 14 conversations",
        "7% of the answers end by themselves, the others were cut off",
        "the validation loss rose from 1.5000 at step 1 to 1.7500",
    ]
