"""Measures are of sums, over what was answered; what is not defined is None, never 0."""

import math
from typing import Any

import pytest

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.scoring.measures import MEASURES, Prediction, histogram, scored, summarise, values


def asked(*references: str) -> list[Conversation]:
    """Conversations "0", "1", ..., of one turn each."""
    return [
        Conversation(str(number), "c", [Message(role="user", content="?"), Message(role="assistant", content=reference)])
        for number, reference in enumerate(references)
    ]


def answered(*answers: str | None) -> list[Prediction]:
    """To the conversations "0", "1", ..., not scored yet; None: the turn was not answered."""
    likelihood = {"nll_sum": 4.0, "stop_nll": 0.5, "tokens": 4, "bytes": 7}
    said = [{"answer": None} if answer is None else {"answer": answer, "answer_tokens": 4, "stopped": True} for answer in answers]
    return [{"id": str(number), "turn": 0, "seed": 0, "category": "c", **likelihood, **row} for number, row in enumerate(said)]


def test_a_summary_divides_sums_by_counts() -> None:
    def row(category: str, nll_sum: float, tokens: int, right: bool) -> Prediction:
        changes = {"category": category, "nll_sum": nll_sum, "stop_nll": 1.0, "tokens": tokens, "bytes": tokens, "stopped": right}
        (found,) = scored(answered("a b c d" if right else "x"), asked("a b c d"))
        return {**found, **changes}

    metrics = summarise([row("a", 20.0, 10, True), row("b", 90.0, 90, False)], {"conversations": 2, "too_long": 0}, {})
    assert metrics["nll"] == pytest.approx(1.1)
    assert metrics["perplexity"] == pytest.approx(math.exp(1.1))
    assert metrics["bits_per_byte"] == pytest.approx(108 / 100 / math.log(2))
    assert metrics["exact_match"] == metrics["stop_rate"] == 0.5
    assert metrics["by_category"]["a"]["nll"] == 2.0
    assert metrics["by_category"]["a"]["bleu"] == pytest.approx(100)
    assert metrics["counts"] == {"conversations": 2, "too_long": 0, "turns": 2, "tokens": 100}
    assert math.isfinite(summarise([row("a", 1e9, 1, True)], {}, {})["perplexity"])


def test_a_histogram_counts_every_answer_once() -> None:
    rows = scored(answered("a b c d", "a b", "x", "a b c d", None), asked(*["a b c d"] * 5))
    assert dict(histogram(rows, "rouge_l", bins=4)) == {0.0: 1, 0.25: 0, 0.5: 0, 0.75: 1, 1.0: 2}


@pytest.mark.parametrize(
    ("answer", "reference"), [("caf\u00e9 \u1ec7", "cafe\u0301 e\u0323\u0302"), ("cafe\u0301 e\u0323\u0302", "caf\u00e9 \u1ec7")]
)
def test_one_character_in_two_spellings_is_the_same_text(answer: str, reference: str) -> None:
    assert answer != reference
    found = values(scored(answered(answer), asked(f" {reference}\n")))
    for name in ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "length_ratio"):
        assert found[name] == 1, name
    assert found["chrf"] == pytest.approx(100)


def test_other_characters_that_look_alike_are_another_text() -> None:
    # Normal form KC would make them one.
    assert values(scored(answered("\ufb01x"), asked("fix")))["exact_match"] == 0


def test_the_predictions_themselves_stay_as_they_are() -> None:
    rows = answered("cafe\u0301", None)
    found = scored(rows, asked("x", "y"))
    assert found[0]["answer"] == "cafe\u0301"
    assert "statistics" not in rows[0]
    assert found[1] == rows[1], "a turn that was not answered has no statistics"


def test_a_score_that_no_answer_defines_is_none_and_the_others_stand() -> None:
    found = values(scored(answered("yes", "no"), asked("yes", "yes")))
    assert found["bleu"] is None, "one word has no 4-gram"
    assert {name for name, value in found.items() if value is None} == {"bleu"}
    assert found["exact_match"] == 0.5
    summary: dict[str, Any] = summarise(scored(answered("yes", "a b c d"), asked("yes", "a b c d")), {}, {})
    assert summary["bleu"] == pytest.approx(100), "of the whole it is defined"
    assert summarise(scored(answered("yes"), asked("yes")), {}, {})["by_category"]["c"]["bleu"] is None


def test_a_score_over_nothing_is_none() -> None:
    found = values(scored(answered("a"), asked(" ")))
    assert found["length_ratio"] is None
    assert found["exact_match"] == 0
    no_tokens = [{**row, "tokens": 0} for row in scored(answered("a"), asked("a"))]
    assert (values(no_tokens)["nll"], values(no_tokens)["perplexity"]) == (None, None)
    unanswered = values(answered(None))
    assert {name for name, value in unanswered.items() if value is None} == {name for name, measure in MEASURES.items() if measure.of_answers}


def test_seeds_of_which_one_has_no_score_have_no_deviation_of_it() -> None:
    first, second = scored(answered("yes"), asked("yes")), scored(answered("yes or no or both"), asked("yes"))
    found = summarise([*first, {**second[0], "seed": 1}], {}, {})["seed_deviation"]
    assert found["bleu"] is None
    assert found["exact_match"] == pytest.approx(0.5**0.5)


def test_a_prediction_of_another_test_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[predictions-foreign\] turn 0 of conversation 1 "):
        scored(answered("a", "b"), asked("a"))


def test_numbers_by_file_are_of_the_conversations_whose_file_is_told() -> None:
    rows = scored(answered("yes", "no"), asked("yes", "yes"))
    found = summarise(rows, {}, {"0": "chat.jsonl"})
    assert found["by_source"].keys() == {"chat.jsonl"}
    assert found["by_source"]["chat.jsonl"]["exact_match"] == 1.0
    assert "by_source" not in summarise(rows, {}, {})
