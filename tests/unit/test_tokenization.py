from typing import Any

import pytest

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.model.chat_template import ChatTemplate
from qlora.params.sequence import SequenceParams
from qlora.training.tokenization import IGNORE_INDEX, EncodedSplit, encode_split, length_histogram, show, token_texts
from tests.helpers import only_row

NOTHING = {"control_token": 0, "not_rendered": 0, "inseparable": 0, "too_long": 0, "no_answer_left": 0}

SHORT = Conversation("short", "c", [Message(role="user", content="2+2?"), Message(role="assistant", content="4")])
LONG = Conversation("long", "c", [Message(role="user", content="2+2?" * 40), Message(role="assistant", content="4")])


def sequence(**changes: Any) -> SequenceParams:
    return SequenceParams(**{"max_length": 64, "on_too_long": "drop", "packing": "bfd", "assistant_only_loss": True, **changes})


def test_only_assistant_tokens_are_trained_on(template: ChatTemplate, tokenizer: Any) -> None:
    (example,) = encode_split([SHORT], template, sequence(), "train").examples
    assert tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "4<|eot_id|>"
    assert len(example.labels) == len(example.ids)
    assert example.supervised == 2


def test_every_token_is_trained_on_when_asked(template: ChatTemplate) -> None:
    (example,) = encode_split([SHORT], template, sequence(assistant_only_loss=False), "train").examples
    assert example.labels == [IGNORE_INDEX, *example.ids[1:]]
    assert example.supervised == len(example.ids) - 1


def test_what_does_not_fit_is_dropped_and_counted_never_cut(template: ChatTemplate) -> None:
    made = encode_split([LONG, SHORT], template, sequence(), "train")
    assert [example.ids for example in made.examples] == [only_row(template, SHORT).ids]
    assert made.dropped == NOTHING | {"too_long": 1}


def test_a_conversation_of_exactly_max_length_fits(template: ChatTemplate) -> None:
    length = len(only_row(template, SHORT).ids)
    assert len(encode_split([SHORT], template, sequence(max_length=length), "train").examples) == 1
    with pytest.raises(InputError, match="sequence-all-dropped"):
        encode_split([SHORT], template, sequence(max_length=length - 1), "train")


def test_a_conversation_that_does_not_fit_can_end_the_run(template: ChatTemplate) -> None:
    with pytest.raises(InputError, match=r"\[sequence-too-long\] train conversation long has \d+ tokens, sequence.max_length is 64"):
        encode_split([SHORT, LONG], template, sequence(on_too_long="error"), "train")


def test_an_example_is_shown_with_what_is_supervised_marked(template: ChatTemplate, tokenizer: Any) -> None:
    (example,) = encode_split([SHORT], template, sequence(), "train").examples
    assert show(example, tokenizer) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦4<|eot_id|>⟧"
    )


TWO = Conversation("two", "c", [*SHORT.messages, Message(role="user", content="go"), Message(role="assistant", content="1 2 3 " * 7 + "4")])


def labels_of(template: ChatTemplate, **changes: Any) -> tuple[EncodedSplit, list[int], list[tuple[int, int]]]:
    encoded = only_row(template, TWO)
    return encode_split([TWO, SHORT], template, sequence(**changes), "train"), encoded.ids, encoded.spans


def test_a_truncated_conversation_keeps_its_first_tokens_and_the_rest_is_counted(template: ChatTemplate) -> None:
    ((_, first_end), (second, end)) = labels_of(template)[2]
    most = second + 3
    made, ids, _ = labels_of(template, max_length=most, on_too_long="truncate")
    assert made.examples[0].ids == ids[:most]
    assert made.examples[0].supervised == 2 + 3
    assert made.record()["conversations"] == {"in": 2, "out": 2, "cut": 1, "one_by_one": 0, "dropped": NOTHING}
    assert made.truncated_tokens == len(ids) - most
    # The second answer is supervised without its end.
    assert (made.answers, made.ends) == (3, 2)
    # Cut before the second answer begins, only the first counts.
    made, _, _ = labels_of(template, max_length=first_end + 1, on_too_long="truncate")
    assert (made.answers, made.ends, end) == (2, 2, len(ids))


def test_a_conversation_whose_answers_are_all_cut_off_is_dropped(template: ChatTemplate) -> None:
    made = encode_split([LONG, SHORT], template, sequence(on_too_long="truncate"), "train")
    assert len(made.examples) == 1
    assert made.dropped["no_answer_left"] == 1
    assert made.dropped_tokens == len(only_row(template, LONG).ids)


def test_a_split_conversation_teaches_each_token_once(template: ChatTemplate) -> None:
    made, ids, spans = labels_of(template, max_length=20, on_too_long="split")
    pieces = made.examples[:-1]
    assert all(len(piece.ids) <= 20 for piece in pieces)
    assert all(piece.labels[0] == IGNORE_INDEX for piece in pieces)
    learned = [label for piece in pieces for label in piece.labels if label != IGNORE_INDEX]
    assert learned == [ids[place] for start, end in spans for place in range(start, end)]
    assert made.record()["end_of_turn_per_answer"] == 1.0
    assert made.cut == 1


def test_a_piece_without_an_answer_is_left_out(template: ChatTemplate) -> None:
    made = encode_split([LONG, SHORT], template, sequence(max_length=32, on_too_long="split"), "train")
    length = len(only_row(template, LONG).ids)
    (kept, _) = made.examples
    assert kept.supervised == 2
    assert made.truncated_tokens == length - len(kept.ids)
    assert made.repeated_tokens == 0


def test_a_dropped_conversation_is_counted_with_its_tokens(template: ChatTemplate) -> None:
    longest, _, two = (len(only_row(template, conversation).ids) for conversation in (LONG, SHORT, TWO))
    record = encode_split([LONG, SHORT, TWO], template, sequence(max_length=two), "train").record()
    assert longest > two
    assert record["conversations"]["dropped"]["too_long"] == 1
    assert record["tokens"]["dropped"] == longest
    assert record["tokens"]["supervised_share"] == record["tokens"]["supervised"] / record["tokens"]["out"]


def test_the_pad_token_is_never_learned(template: ChatTemplate) -> None:
    template.tokenizer.pad_token = "<|eot_id|>"
    with pytest.raises(InputError, match=r"chat-pad\] train conversation short teaches the model to write its pad token '<\|eot_id\|>'"):
        encode_split([SHORT], template, sequence(), "train")


def test_lengths_are_counted_below_edges_a_power_of_two_apart() -> None:
    assert length_histogram([3, 4, 4]) == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    histogram = length_histogram([3, 4, 65])
    assert histogram[:3] == [(2, 0), (4, 1), (6, 1)]
    assert histogram[-1] == (66, 1)
    assert len(length_histogram([5000])) <= 64


def test_a_character_of_several_tokens_is_shown_whole_and_nothing_steers_the_terminal(tokenizer: Any) -> None:
    ids = tokenizer("東京 🙂 ok \x1b[31m", add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids).replace("\x1b", "\\x1b")


def test_answers_that_stand_alone_and_are_too_long_are_counted() -> None:
    from tests.families import stand_in, stock, talk
    from tests.helpers import chat_params

    template = ChatTemplate(stand_in("qwen3", stock()["qwen3"]), chat_params())
    conversation = talk("Why?", "a", "And?", "b " * 100)
    made = encode_split([conversation], template, sequence(max_length=60), "train")
    record = made.record()
    assert (len(made.examples), record["conversations"]["cut"], record["conversations"]["one_by_one"]) == (1, 1, 1)
    assert record["answers"] == {"in": 2, "out": 1}
