from typing import Any

import pytest

from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation, Message
from qlora.encoding import IGNORE_INDEX, encode_split, show
from qlora.errors import InputError
from qlora.params.sequence import SequenceParams

SHORT = Conversation("short", "c", [Message(role="user", content="2+2?"), Message(role="assistant", content="4")])
LONG = Conversation("long", "c", [Message(role="user", content="2+2?" * 40), Message(role="assistant", content="4")])


def sequence(**changes: Any) -> SequenceParams:
    return SequenceParams(**{"max_length": 64, "on_too_long": "drop", "packing": True, "assistant_only_loss": True, **changes})


def test_only_assistant_tokens_are_trained_on(template: ChatTemplate, tokenizer: Any) -> None:
    (example,), _ = encode_split([SHORT], template, sequence(), "train")
    assert tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "4<|eot_id|>"
    assert len(example.labels) == len(example.ids)
    assert example.supervised == 2


def test_every_token_is_trained_on_when_asked(template: ChatTemplate) -> None:
    (example,), _ = encode_split([SHORT], template, sequence(assistant_only_loss=False), "train")
    assert example.labels == example.ids
    assert example.supervised == len(example.ids) - 1


def test_what_does_not_fit_is_dropped_and_counted_never_cut(template: ChatTemplate) -> None:
    examples, dropped = encode_split([LONG, SHORT], template, sequence(), "train")
    assert [example.ids for example in examples] == [template.encode(SHORT).ids]
    assert dropped == {"control_token": 0, "too_long": 1}


def test_a_conversation_of_exactly_max_length_fits(template: ChatTemplate) -> None:
    length = len(template.encode(SHORT).ids)
    assert len(encode_split([SHORT], template, sequence(max_length=length), "train")[0]) == 1
    with pytest.raises(InputError, match="sequence-all-dropped"):
        encode_split([SHORT], template, sequence(max_length=length - 1), "train")


def test_a_conversation_that_does_not_fit_can_end_the_run(template: ChatTemplate) -> None:
    with pytest.raises(InputError, match=r"train conversation long has \d+ tokens, sequence.max_length is 64"):
        encode_split([SHORT, LONG], template, sequence(on_too_long="error"), "train")


def test_an_example_is_shown_with_what_is_supervised_marked(template: ChatTemplate, tokenizer: Any) -> None:
    (example,), _ = encode_split([SHORT], template, sequence(), "train")
    assert show(example, tokenizer) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦4<|eot_id|>⟧"
    )
