"""The chat form of the real Llama-3-8B-Instruct tokenizer, first release: its eos_token is not what ends a turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from tests.helpers import chat_params, only_row

CONVERSATION = Conversation(
    "id",
    "c",
    [
        Message(role="system", content="Be brief."),
        Message(role="user", content="2+2?"),
        Message(role="assistant", content="4"),
        Message(role="user", content="3+3?"),
        Message(role="assistant", content="6"),
    ],
)


@pytest.fixture(scope="module")
def tokenizer(real_data: Callable[[str], Path]) -> Any:
    return load_tokenizer(real_data("llama3_tokenizer"))


def test_answers_and_their_end_of_turn_are_marked(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, chat_params())
    encoded = only_row(template, CONVERSATION)
    assert [tokenizer.decode(encoded.ids[start:end]) for start, end in encoded.spans] == ["4<|eot_id|>", "6<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(template.end_of_turn) == "<|eot_id|>"
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert encoded.ids.count(tokenizer.bos_token_id) == 1


def test_ids_are_those_of_the_models_own_template(tokenizer: Any, real_data: Callable[[str], Path]) -> None:
    encoded = only_row(ChatTemplate(tokenizer, chat_params()), CONVERSATION)
    untouched = load_tokenizer(real_data("llama3_tokenizer"))
    assert encoded.ids == untouched.apply_chat_template(list(CONVERSATION.messages), tokenize=True, return_dict=True)["input_ids"]


def test_no_special_token_in_a_text_becomes_structure(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, chat_params())
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(special) == 256
    for text in special:
        for place, content in enumerate((f"{text} a", f"a {text} b", f"a{text}")):
            messages = [Message(role="user", content="a"), Message(role="assistant", content="b")]
            messages[place % 2] = Message(role=messages[place % 2]["role"], content=content)
            with pytest.raises(InputError, match="chat-control-token"):
                template.encode(Conversation("id", "c", messages))


def test_every_special_token_in_every_place_is_read_as_text_when_escaped(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, chat_params("model", "escape"))
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    plain = only_row(template, CONVERSATION)
    structure = [number for number in plain.ids if number in special]
    forgeries = 0
    for text in special.values():
        for form in (f"{text} a", f"a {text} b", f"a{text}"):
            place = forgeries % len(CONVERSATION.messages)
            messages = list(CONVERSATION.messages)
            messages[place] = Message(role=messages[place]["role"], content=form)
            encoded = only_row(template, Conversation("id", "c", messages))
            assert [number for number in encoded.ids if number in special] == structure
            assert len(encoded.spans) == 2
            assert form in tokenizer.decode(encoded.ids)
            forgeries += 1
    assert forgeries == 768
