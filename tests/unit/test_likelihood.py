import math
from typing import Any

import pytest
import torch

from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation, Message
from qlora.likelihood import mean_nll, perplexity, turn_nlls


def test_each_turn_is_scored_as_the_full_logits_say(tiny_model: Any, template: ChatTemplate) -> None:
    messages = [
        Message(role=role, content=content) for role, content in (("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "six"))
    ]
    encoded = template.encode(Conversation("id", "c", messages))
    with torch.no_grad():
        log_probs = tiny_model(input_ids=torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    expected = [-sum(float(log_probs[place - 1, encoded.ids[place]]) for place in range(start, end)) for start, end in encoded.spans]
    assert turn_nlls(tiny_model, encoded, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)


def test_the_mean_is_a_sum_over_a_count_not_a_mean_of_means() -> None:
    # 10 tokens at 2.0 nats and 90 at 1.0.
    nll = mean_nll([20.0, 90.0], [10, 90])
    assert nll == pytest.approx(1.1)
    assert perplexity(nll) == pytest.approx(math.exp(1.1))


def test_perplexity_stays_a_finite_number() -> None:
    assert math.isfinite(perplexity(1e6))
