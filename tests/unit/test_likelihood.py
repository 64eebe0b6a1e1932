from typing import Any

import pytest
import torch

from qlora.core.conversation import Conversation, Message
from qlora.model.chat_template import ChatTemplate
from qlora.prediction.likelihood import turn_nlls
from tests.helpers import only_row


def test_each_turn_is_scored_as_the_full_logits_say(tiny_model: Any, template: ChatTemplate) -> None:
    messages = [
        Message(role=role, content=content) for role, content in (("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "six"))
    ]
    encoded = only_row(template, Conversation("id", "c", messages))
    with torch.no_grad():
        log_probs = tiny_model(input_ids=torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    expected = [-sum(float(log_probs[place - 1, encoded.ids[place]]) for place in range(start, end)) for start, end in encoded.spans]
    ends = [-float(log_probs[end - 2, encoded.ids[end - 1]]) for _, end in encoded.spans]
    found = turn_nlls(tiny_model, encoded, torch.device("cpu"))
    assert [nll for nll, _ in found] == pytest.approx(expected, rel=1e-5)
    assert [stop for _, stop in found] == pytest.approx(ends, rel=1e-5)
