"""Intervals that hold what they say, and verdicts that follow from them."""

from typing import Any

import numpy as np
import pytest

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.scoring import bootstrap
from qlora.scoring.bootstrap import compare
from qlora.scoring.measures import MEASURES, Prediction, scored


def predictions(answers: list[str], references: list[str], nlls: list[float] | None = None, turns: int = 1) -> list[Prediction]:
    """`turns` turns of each conversation."""
    rows: list[Prediction] = []
    messages: dict[str, list[Message]] = {}
    for place, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        nll = nlls[place] if nlls else 4.0
        likelihood = {"nll_sum": nll, "stop_nll": 0.5, "tokens": 4, "bytes": 7}
        identity = {"id": f"{place // turns:04}", "turn": place % turns, "category": "c", "seed": 0}
        rows.append({**identity, **likelihood, "answer": answer, "answer_tokens": 4, "stopped": True})
        asked = messages.setdefault(rows[-1]["id"], [])
        asked += [Message(role="user", content="?"), Message(role="assistant", content=reference)]
    return scored(rows, [Conversation(name, "c", turns) for name, turns in messages.items()])


REFERENCES = [f"the answer is {number}" for number in range(60)]
WRONG = [f"the answer was {number + 1}" for number in range(60)]


def test_the_same_answers_show_no_difference() -> None:
    for found in compare(predictions(WRONG, REFERENCES), predictions(WRONG, REFERENCES), resamples=200).values():
        assert (found.delta, found.low, found.high, found.verdict) == (0, 0, 0, "no difference shown")
        assert found.p_better in (0.5, None)


def test_right_answers_are_better_than_wrong_ones_and_the_other_way_round_worse() -> None:
    nlls = list(np.random.default_rng(0).normal(3, 0.1, 60))
    forth = compare(predictions(WRONG, REFERENCES), predictions(REFERENCES, REFERENCES, nlls), resamples=500)
    back = compare(predictions(REFERENCES, REFERENCES, nlls), predictions(WRONG, REFERENCES), resamples=500)
    for name in ("nll", "perplexity", "bits_per_byte", "exact_match", "token_f1", "rouge_l", "chrf", "bleu"):
        assert (forth[name].verdict, back[name].verdict) == ("better", "worse"), name
        assert forth[name].delta == -back[name].delta
        assert (forth[name].p_better, back[name].p_better) == (1, 0)
        assert forth[name].low <= forth[name].delta <= forth[name].high
    assert forth["exact_match"][:3] == (0, 1, 1)


def test_a_measure_without_direction_is_different_at_most() -> None:
    longer = [f"{answer} and so on" for answer in WRONG]
    found = compare(predictions(WRONG, REFERENCES), predictions(longer, REFERENCES), resamples=200)["length_ratio"]
    assert found.verdict == "different"
    assert found.p_better is None


def test_few_changed_answers_of_many_show_no_difference() -> None:
    changed = [*REFERENCES[:2], *WRONG[2:]]
    found = compare(predictions(WRONG, REFERENCES), predictions(changed, REFERENCES), resamples=2000)["exact_match"]
    assert found.delta == pytest.approx(2 / 60)
    assert found.low == 0
    assert found.verdict == "no difference shown"


def test_turns_of_one_conversation_are_drawn_together() -> None:
    """Twenty turns that are right or wrong together say no more than three conversations do."""
    answers = [*REFERENCES[:40], *WRONG[40:]]
    alone, together = (
        compare(predictions(WRONG, REFERENCES, turns=turns), predictions(answers, REFERENCES, turns=turns), resamples=2000)["exact_match"]
        for turns in (1, 20)
    )
    assert alone.delta == together.delta
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_the_order_of_the_rows_makes_no_difference() -> None:
    before, after = predictions(WRONG, REFERENCES), predictions(REFERENCES, REFERENCES)
    assert compare(before, after[::-1], resamples=100) == compare(before, after, resamples=100)


def test_other_turns_are_refused() -> None:
    with pytest.raises(InputError, match=r"compare-unaligned\] .* 1 are in one of them alone, such as \[\('0059', 0\)\]"):
        compare(predictions(WRONG, REFERENCES), predictions(WRONG[:-1], REFERENCES[:-1]), resamples=10)


def test_a_turn_that_one_side_lacks_or_did_not_answer_is_refused() -> None:
    whole = predictions(WRONG, REFERENCES, turns=2)
    with pytest.raises(InputError, match=r"1 are in one of them alone, such as \[\('0029', 1\)\]"):
        compare(whole, whole[:-1], resamples=10)
    unanswered = [*whole[:-1], {**whole[-1], "answer": None}]
    with pytest.raises(InputError, match=r"the same turns were not answered with the same seeds, such as turn 1 of 0029 with seed 0.*predict.turns"):
        compare(whole, unanswered, resamples=10)
    with pytest.raises(InputError, match=r"such as turn 0 of 0000 with seed 0.*predict.generation_seeds"):
        compare(whole, [{**row, "seed": 1} for row in whole], resamples=10)


def test_measures_per_token_are_left_out_where_the_tokens_differ() -> None:
    before = predictions(WRONG, REFERENCES)
    found = compare(before, [{**row, "tokens": 8} for row in before], resamples=50)
    assert set(MEASURES) - set(found) == {"nll", "perplexity"}
    assert found["bits_per_byte"].verdict == "no difference shown"


def test_few_conversations_give_no_verdict() -> None:
    few = bootstrap.FEWEST - 1
    sides = predictions(WRONG[:few], REFERENCES[:few]), predictions(REFERENCES[:few], REFERENCES[:few])
    assert compare(*sides, resamples=50)["exact_match"].verdict == "no difference shown"
    assert (
        compare(predictions(WRONG[: few + 1], REFERENCES[: few + 1]), predictions(REFERENCES[: few + 1], REFERENCES[: few + 1]), resamples=50)[
            "exact_match"
        ].verdict
        == "better"
    )


@pytest.mark.parametrize("kind", ["normal", "binary", "ratio"])
def test_the_interval_holds_the_truth_in_95_of_100_experiments(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Experiments with a known difference; 1,500 of them give the coverage to 1.1 % (two standard errors)."""
    rng = np.random.default_rng(1)
    held, truth, count = 0, 0.0, 150
    measure = MEASURES["nll"]
    for experiment in range(1500):
        monkeypatch.setattr(bootstrap, "SEED", experiment)
        if kind == "normal":
            before, after, truth = rng.normal(0, 1, (count, 1)), rng.normal(0.2, 1.5, (count, 1)), 0.2
        elif kind == "binary":
            before = rng.random((count, 1)) < 0.4
            after, truth = np.where(rng.random((count, 1)) < 0.8, before, rng.random((count, 1)) < 0.7), 0.2 * (0.7 - 0.4)
        else:
            lengths = rng.integers(1, 40, (count, 1))
            before, after = (np.hstack([lengths * rng.normal(mean, 0.3, (count, 1)), lengths]) for mean in (2.0, 1.9))
            truth = -0.1
        sums = [side if kind == "ratio" else np.hstack([side, np.ones((count, 1))]) for side in (before, after)]
        drawn = np.concatenate([measure.value(weights @ sums[1]) - measure.value(weights @ sums[0]) for weights in bootstrap._weights(count, 1000)])
        found = bootstrap._difference(measure, sums[0], sums[1], drawn)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 1500 <= 0.97


def test_every_resample_draws_as_many_conversations_as_there_are() -> None:
    weights = np.concatenate(list(bootstrap._weights(50, 300)))
    assert weights.shape == (300, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.std() == pytest.approx(1, abs=0.05)


def test_the_record_holds_what_metrics_can_show() -> None:
    record: dict[str, Any] = bootstrap.record(compare(predictions(WRONG, REFERENCES), predictions(REFERENCES, REFERENCES), resamples=50))
    assert record["exact_match"] == {"delta": 1, "low": 1, "high": 1, "p_better": 1}
    assert set(record["length_ratio"]) == {"delta", "low", "high"}


@pytest.mark.parametrize("undefined", [0, 1])
def test_a_score_that_one_side_does_not_define_has_no_difference(undefined: int) -> None:
    """BLEU of answers of one word."""
    sides = [predictions(REFERENCES, REFERENCES), predictions(REFERENCES, REFERENCES)]
    sides[undefined] = predictions(["yes"] * 60, REFERENCES)
    found = compare(sides[0], sides[1], resamples=50)
    assert found["bleu"].verdict == "not defined"
    values = found["bleu"].before, found["bleu"].after
    assert values[undefined] is None
    assert values[1 - undefined] == pytest.approx(100)
    assert found["bleu"][2:6] == (None, None, None, None)
    assert bootstrap.record(found)["bleu"] == {"delta": None, "low": None, "high": None, "p_better": None}
    assert found["exact_match"].verdict == ("better" if undefined == 0 else "worse")


def test_resamples_without_a_value_do_not_count() -> None:
    """One answer of 13 has 4-grams: 1 resample in 3 draws it not once."""
    answers = ["yes"] * 12 + ["a b c d e"]
    found = compare(predictions(answers, answers), predictions(answers, answers), resamples=200)["bleu"]
    assert (found.delta, found.low, found.high, found.verdict) == (0, 0, 0, "no difference shown")


def test_predictions_without_an_answer_are_compared_by_their_likelihood() -> None:
    """Turns that call tools are not answered."""
    before, after = (predictions(["a"] * 20, ["a"] * 20, [nll] * 20) for nll in (4.0, 2.0))
    unanswered = [[{**row, "answer": None} for row in rows] for rows in (before, after)]
    assert compare(*unanswered, resamples=200).keys() == {"nll", "perplexity", "bits_per_byte"}
