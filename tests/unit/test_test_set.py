from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.model.chat_template import ChatTemplate
from qlora.model.loading import load_model
from qlora.params import Params
from qlora.prediction import test_set
from qlora.scoring.measures import Prediction, scored, summarise
from tests.helpers import only_row

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


def conversations() -> list[Conversation]:
    def messages(*contents: str) -> list[Message]:
        return [Message(role=("user", "assistant")[place % 2], content=content) for place, content in enumerate(contents)]

    return [
        Conversation("short", "a", messages("2+2?", "4")),
        Conversation("long", "b", messages("2+2?" * 300, "4")),
        Conversation("multi", "b", messages("2+2?", "4", "3+3?", "sechs é")),
    ]


def predict(model: Any, template: ChatTemplate, params: Params, **changes: Any) -> Any:
    values = params.predict.model_copy(update={"max_new_tokens": 2, **changes})
    return test_set.predict(model, template, conversations(), values, torch.device("cpu"), progress=False)


def summary_of(predictions: list[Prediction], counts: dict[str, int]) -> dict[str, Any]:
    return summarise(scored(predictions, conversations()), counts, {})


def test_every_turn_in_the_order_of_the_test_set_and_what_is_too_long_is_counted(
    tiny_model: Any, template: ChatTemplate, default_params: Params
) -> None:
    predictions, counts, batches = predict(tiny_model, template, default_params)
    assert [(row["id"], row["turn"], row["category"]) for row in predictions] == [("short", 0, "a"), ("multi", 0, "b"), ("multi", 1, "b")]
    assert {name: count for name, count in counts.items() if count and "characters" not in name} == {"conversations": 3, "too_long": 1}
    assert [row["bytes"] for row in predictions] == [1, 1, 8]
    assert predictions[0]["tokens"] == 2
    assert all(0 < row["stop_nll"] < row["nll_sum"] for row in predictions)
    assert batches == [{"batch": 0, "turns": [["multi", 1], ["short", 0], ["multi", 0]]}]


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_no_figure_depends_on_the_batch(tiny_model: Any, template: ChatTemplate, default_params: Params, batch_tokens: int) -> None:
    small, large = (predict(tiny_model, template, default_params, batch_tokens=tokens) for tokens in (batch_tokens, 1000))
    assert small.predictions == large.predictions
    assert len(small.batches) > len(large.batches)


def test_the_last_turn_alone_can_be_answered_and_likelihood_stays_that_of_all(
    tiny_model: Any, template: ChatTemplate, default_params: Params
) -> None:
    every, last = (predict(tiny_model, template, default_params, turns=turns) for turns in ("all", "last"))
    assert [row["answer"] is None for row in last.predictions] == [False, True, False]
    assert [row["answer"] for row in last.predictions[::2]] == [row["answer"] for row in every.predictions[::2]]
    summaries = [summary_of(found.predictions, found.counts) for found in (every, last)]
    assert summaries[0]["nll"] == summaries[1]["nll"]
    assert summaries[0].keys() == summaries[1].keys()


def test_a_stable_few_conversations_are_chosen(tiny_model: Any, template: ChatTemplate, default_params: Params) -> None:
    chosen = predict(tiny_model, template, default_params, num_examples=2)
    # "long" and "multi" have the smallest ids; "long" is too long.
    assert {row["id"] for row in chosen.predictions} == {"multi"}
    assert {name: count for name, count in chosen.counts.items() if count and "characters" not in name} == {
        "conversations": 3,
        "not_chosen": 1,
        "too_long": 1,
    }
    assert predict(tiny_model, template, default_params, num_examples=99).counts["not_chosen"] == 0


def test_each_seed_answers_and_their_deviation_is_told(tiny_model: Any, template: ChatTemplate, default_params: Params) -> None:
    changes = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "max_new_tokens": 6}
    both = predict(tiny_model, template, default_params, generation_seeds=[3, 4], **changes)
    assert [(row["id"], row["turn"], row["seed"]) for row in both.predictions[:3]] == [("short", 0, 3), ("short", 0, 4), ("multi", 0, 3)]
    alone = predict(tiny_model, template, default_params, generation_seeds=[4], **changes)
    assert [row for row in both.predictions if row["seed"] == 4] == alone.predictions
    summary = summary_of(both.predictions, both.counts)
    each = [summary_of([row for row in both.predictions if row["seed"] == seed], both.counts) for seed in (3, 4)]
    assert summary["nll"] == pytest.approx(each[0]["nll"])
    assert summary["seed_deviation"]["chrf"] == pytest.approx(abs(each[0]["chrf"] - each[1]["chrf"]) / 2**0.5)
    assert summary["counts"]["turns"] == 3


def test_a_model_that_overflows_is_named_and_nothing_is_answered(tiny_model: Any, template: ChatTemplate, default_params: Params) -> None:
    """JSON would hold null in place of NaN, and scoring would fail later."""
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[:] = float("inf")
    with pytest.raises(InputError, match=r"\[predict-not-finite\] the likelihood of turn 0 of test conversation short is nan"):
        predict(tiny_model, template, default_params)


def test_too_long_can_end_the_run(tiny_model: Any, template: ChatTemplate, default_params: Params) -> None:
    with pytest.raises(InputError, match=r"test conversation long has \d+ tokens, the model's context 512"):
        predict(tiny_model, template, default_params, on_too_long="error")


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({}, 1e-5), ({"dtype": "bfloat16"}, 2e-3), ({"load_in_4bit": True}, 2e-3)],
    ids=["float32", "bfloat16", "4-bit"],
)
def test_nll_is_that_of_a_plain_computation_whatever_the_batch(
    template: ChatTemplate, default_params: Params, changes: dict[str, Any], tolerance: float
) -> None:
    model = load_model(default_params.base_model.model_copy(update=changes), TINY, torch.device("cpu"), progress=False)
    nats, tokens = 0.0, 0
    for conversation in (conversations()[0], conversations()[2]):
        encoded = only_row(template, conversation)
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
        for place in (place for start, end in encoded.spans for place in range(start, end)):
            nats -= float(log_probabilities[place - 1, encoded.ids[place]])
            tokens += 1
    for batch_tokens in (1, 100, 1000):
        found = predict(model, template, default_params, batch_tokens=batch_tokens)
        assert summary_of(found.predictions, found.counts)["nll"] == pytest.approx(nats / tokens, abs=tolerance)
