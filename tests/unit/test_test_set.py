from typing import Any

import pytest
import torch

from qlora import test_set
from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation, Message
from qlora.errors import InputError
from qlora.params import Params


def conversations() -> list[Conversation]:
    def messages(*contents: str) -> list[Message]:
        return [Message(role=("user", "assistant")[place % 2], content=content) for place, content in enumerate(contents)]

    return [
        Conversation("short", "a", messages("2+2?", "4")),
        Conversation("long", "b", messages("2+2?" * 300, "4")),
        Conversation("multi", "b", messages("2+2?", "4", "3+3?", "sechs é")),
    ]


def predict(model: Any, template: ChatTemplate, params: Params, **changes: Any) -> Any:
    values = params.evaluate.model_copy(update={"max_new_tokens": 2, **changes})
    return test_set.predict(model, template, conversations(), values, torch.device("cpu"), progress=False)


def test_every_turn_in_the_order_of_the_test_set_and_what_is_too_long_is_counted(
    tiny_model: Any, template: ChatTemplate, default_params: Params
) -> None:
    predictions, counts = predict(tiny_model, template, default_params)
    assert [(row["id"], row["turn"], row["category"]) for row in predictions] == [("short", 0, "a"), ("multi", 0, "b"), ("multi", 1, "b")]
    assert counts == {"conversations": 3, "control_token": 0, "too_long": 1}
    assert [row["bytes"] for row in predictions] == [1, 1, 8]
    assert predictions[0]["tokens"] == 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_figure_depends_on_the_batch(tiny_model: Any, template: ChatTemplate, default_params: Params, batch_size: int) -> None:
    assert predict(tiny_model, template, default_params, batch_size=batch_size) == predict(tiny_model, template, default_params)


def test_too_long_can_end_the_run(tiny_model: Any, template: ChatTemplate, default_params: Params) -> None:
    with pytest.raises(InputError, match=r"test conversation long has \d+ tokens, the model's context 512"):
        predict(tiny_model, template, default_params, on_too_long="error")


def test_a_summary_divides_sums_by_counts() -> None:
    def row(category: str, nll_sum: float, tokens: int, exact: float) -> dict[str, Any]:
        return {"category": category, "nll_sum": nll_sum, "tokens": tokens, "stopped": True, "exact_match": exact, "rouge_l": 0.5}

    metrics = test_set.summarise([row("a", 20.0, 10, 1.0), row("b", 90.0, 90, 0.0)], {"conversations": 2, "too_long": 0})
    assert metrics["nll"] == pytest.approx(1.1)
    assert metrics["exact_match"] == 0.5
    assert metrics["by_category"]["a"]["nll"] == 2.0
    assert metrics["counts"] == {"conversations": 2, "too_long": 0, "turns": 2, "tokens": 100}
    assert test_set.deltas(metrics, {**metrics, "exact_match": 0.125})["exact_match"] == 0.375
