"""Random conversations: what is supervised is the answers and their ends, and no text becomes structure."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.model.chat_template import ChatTemplate
from qlora.params.sequence import SequenceParams
from qlora.training.tokenization import IGNORE_INDEX, encode_split
from tests.helpers import chat_params

LENIENT = settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs", "Co"]), min_size=1, max_size=60).filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def conversation(talk: list[tuple[str, str]]) -> Conversation:
    roles = ("user", "assistant")
    return Conversation("id", "c", [Message(role=role, content=text) for pair in talk for role, text in zip(roles, pair, strict=True)])


def sequence(length: int, on_too_long: Any = "drop", *, assistant_only_loss: bool = True) -> SequenceParams:
    return SequenceParams(max_length=length, on_too_long=on_too_long, packing="bfd", assistant_only_loss=assistant_only_loss)


@LENIENT
@given(TALKS)
def test_what_is_learned_is_every_answer_and_its_end_and_nothing_else(template: ChatTemplate, tokenizer: Any, talk: list[tuple[str, str]]) -> None:
    (example,) = encode_split([conversation(talk)], template, sequence(100_000), "train").examples
    learned = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    rendered = tokenizer.apply_chat_template(list(conversation(talk).messages), tokenize=False)
    answers = [part.split("<|eot_id|>")[0] for part in rendered.split("<|start_header_id|>assistant<|end_header_id|>\n\n")[1:]]
    round_trip = [tokenizer.decode(tokenizer(f"\n\n{answer}", add_special_tokens=False)["input_ids"])[2:] for answer in answers]
    assert learned == "".join(f"{answer}<|eot_id|>" for answer in round_trip)
    assert len(example.ids) == len(example.labels)
    assert all(label in (IGNORE_INDEX, number) for number, label in zip(example.ids, example.labels, strict=True))


@pytest.mark.parametrize("assistant_only_loss", [True, False])
@pytest.mark.parametrize("on_too_long", ["drop", "truncate", "split"])
@LENIENT
@given(talks=st.lists(TALKS, min_size=1, max_size=5), length=st.integers(10, 120))
def test_every_conversation_and_every_token_is_accounted_for(
    template: ChatTemplate, talks: list[list[tuple[str, str]]], length: int, on_too_long: str, assistant_only_loss: bool
) -> None:
    conversations = [conversation(talk) for talk in talks]
    whole = encode_split(conversations, template, sequence(100_000, assistant_only_loss=assistant_only_loss), "train")
    try:
        made = encode_split(conversations, template, sequence(length, on_too_long, assistant_only_loss=assistant_only_loss), "train")
    except InputError as error:
        if error.code != "sequence-all-dropped":
            raise
        return
    record = made.record()
    assert record["conversations"]["in"] == len(talks) == record["conversations"]["out"] + sum(record["conversations"]["dropped"].values())
    tokens = record["tokens"]
    assert tokens["in"] == whole.record()["tokens"]["in"]
    assert tokens["in"] + tokens["repeated"] == tokens["out"] + tokens["dropped"] + tokens["truncated"]
    assert all(len(example.ids) <= length and example.supervised for example in made.examples)
    assert all(example.labels[0] in (IGNORE_INDEX, template.tokenizer.bos_token_id) for example in made.examples)
    if on_too_long == "drop":
        fitting = [example for example in whole.examples if len(example.ids) <= length]
        assert made.examples == fitting
    if on_too_long == "split":
        assert tokens["dropped"] == 0
        assert tokens["supervised"] == whole.record()["tokens"]["supervised"]
    if on_too_long != "truncate":
        assert record["end_of_turn_per_answer"] == 1.0


@pytest.mark.parametrize("policy", ["error", "drop", "escape"])
def test_no_text_changes_the_number_of_turns(tokenizer: Any, policy: Any) -> None:
    template = ChatTemplate(tokenizer, chat_params("model", policy))
    rng = random.Random(0)
    control = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    forged = 0
    while forged < 500:
        pieces = rng.choices([*control.values(), "a", " ", "\n\n", "user", "assistant", "system", "<|", "|>", "é", "<|eot_"], k=rng.randint(1, 8))
        text = "".join(pieces)
        if not text.strip():
            continue
        talk = [["2+2?", "4"], ["3+3?", "6"]]
        talk[rng.randrange(2)][rng.randrange(2)] = text
        whole = conversation([(question, answer) for question, answer in talk])
        forged += 1
        try:
            rows = template.encode(whole).rows
        except InputError as error:
            if error.code != "chat-control-token":
                raise
            continue
        if not rows:
            continue
        (encoded,) = rows
        assert encoded.ids.count(header) == 4
        assert encoded.ids.count(template.end_of_turn) == 4
        assert len(encoded.spans) == 2
