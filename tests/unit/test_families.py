"""Every stock template of the installed TRL, and the plain forms of other families: trained as serving shows it, or refused by name."""

from collections import Counter
from typing import Any

import pytest

from qlora.core.conversation import Conversation, Message
from qlora.core.errors import InputError
from qlora.model.chat_template import ChatTemplate
from tests.families import NO_SWITCH, ODD_TEXTS, TURNS, check, settings_of, stand_in, stock, talk
from tests.helpers import chat_params

STOCK = stock()
REASONS = {
    *("deepseek_r1_distill", "deepseekv3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
}
"""Families whose prompt opens a block of reasoning: plain answers are refused until it is switched off."""
NO_SYSTEM = {"gemma"}


def made(name: str, policy: str = "error", **kwargs: Any) -> ChatTemplate:
    source = STOCK[name]
    return ChatTemplate(stand_in(name, source), chat_params(on_control_tokens=policy, template_kwargs={**settings_of(source), **kwargs}))


def with_plain_answers(name: str) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template, with reasoning switched off where its prompt opens a block of it."""
    kwargs = {"enable_thinking": False} if name in REASONS else {}
    return made(name, **kwargs), kwargs


def test_most_families_train_on_plain_rows() -> None:
    assert len(set(STOCK) - REASONS) >= 24
    assert set(STOCK) >= REASONS


@pytest.mark.parametrize("name", sorted(set(STOCK) - NO_SWITCH))
def test_plain_answers_are_learned_as_serving_shows_them(name: str) -> None:
    template, kwargs = with_plain_answers(name)
    for conversation in (talk(*TURNS[:2]), talk(*TURNS), talk(*(text + "a" + odd for text, odd in zip(TURNS, ODD_TEXTS, strict=False)))):
        check(template, conversation, name, stand_in(name, STOCK[name]), **kwargs)
    odd = [odd + text for odd, text in zip((*ODD_TEXTS, *ODD_TEXTS), TURNS, strict=False)]
    assert check(template, talk(*odd), name, stand_in(name, STOCK[name]), **kwargs).trimmed in (0, *range(8, 60))
    system = talk(*TURNS, system="Be brief.")
    if name in NO_SYSTEM:
        with pytest.raises(InputError, match=r"\[chat-template\] .*System role not supported.*set data.system_message to null"):
            template.encode(system)
    else:
        check(template, system, name, stand_in(name, STOCK[name]), **kwargs)


@pytest.mark.parametrize("name", sorted(STOCK))
def test_reasoning_is_learned_or_refused_by_name(name: str) -> None:
    template = made(name)
    conversation = talk(*TURNS[:4], reasoning="It must be so.")
    if template._structure.reasoning or template._structure.opened:
        if name == "qwen3_5_nothink":
            with pytest.raises(InputError, match="would never be written"):
                template.encode(conversation)
            template = made(name, enable_thinking=True)
        given = {"enable_thinking": True} if name == "qwen3_5_nothink" else {}
        encoding = check(template, conversation, name, stand_in(name, STOCK[name]), **given)
        for row, (start, end) in encoding.answers():
            assert "It must be so." in template.tokenizer.decode(row.ids[start:end])
            assert template.content_of(row.ids[start : end - 1]) in TURNS
            # Cut off before it had an answer.
            assert template.content_of(row.ids[start : start + 3]) == ""
    else:
        with pytest.raises(InputError, match=r"\[chat-text-lost\] .*leaves out the reasoning"):
            template.encode(conversation)


@pytest.mark.parametrize("name", sorted(REASONS))
def test_plain_answers_are_refused_where_the_prompt_opens_a_block_of_reasoning(name: str) -> None:
    with pytest.raises(InputError, match=r"\[chat-reasoning\] .*'<think>\\n', a block of reasoning, and this answer has none") as caught:
        made(name).encode(talk(*TURNS))
    assert ('{"enable_thinking": false}' in str(caught.value)) == (name not in NO_SWITCH)


@pytest.mark.parametrize("name", sorted(name for name in STOCK if settings_of(STOCK[name])))
def test_a_template_that_asks_for_the_date_is_refused_until_it_is_fixed(name: str) -> None:
    source = STOCK[name]
    with pytest.raises(InputError, match=r"\[chat-clock\] .*strftime_now"):
        ChatTemplate(stand_in(name, source), chat_params()).encode(talk(*TURNS))
    template = made(name)
    assert "26 Jul 2024" in template.tokenizer.decode(template.prompt([Message(role="user", content="Hello")]))


@pytest.mark.parametrize("policy", ["error", "drop", "escape"])
@pytest.mark.parametrize("name", sorted(STOCK))
def test_texts_full_of_control_tokens_never_become_structure(name: str, policy: str) -> None:
    kwargs = {"enable_thinking": False} if name in REASONS - NO_SWITCH else {}
    reasoning = "So be it." if name in NO_SWITCH else None
    if (name, policy) == ("llama2", "escape"):
        # Its [INST] is plain text.
        with pytest.raises(InputError, match="chat-escape"):
            made(name, policy)
        return
    template = made(name, policy, **kwargs)
    forged = "a " + " ".join(template._tokens.control) + " b"
    assert "<pad>" in forged
    conversation = talk("Hello " + forged, forged, forged, forged, reasoning=reasoning)
    if policy == "error":
        with pytest.raises(InputError, match="chat-control-token"):
            template.encode(conversation)
    elif policy == "drop":
        assert template.encode(conversation).dropped == "control_token"
    else:
        encoding, plain = template.encode(conversation), template.encode(talk("Hello", "a", "b", "c", reasoning=reasoning))
        control = set(template._tokens.control.values())
        counts = [[Counter(number for number in row.ids if number in control) for row in rows] for rows in (encoding.rows, plain.rows)]
        assert counts[0] == counts[1]
        for row, (start, end) in encoding.answers():
            assert forged in template.tokenizer.decode(row.ids[start:end])


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "qwen2_5", "glm4moe", "gptoss", "gemma4", "deepseekv3", "lfm2_2_5"])
def test_calls_of_tools_are_learned_and_their_results_are_not(name: str) -> None:
    template = made(name)
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"key": 'a "b" c', "most": 5}}}
    reasoning = {"reasoning_content": "So be it."} if name == "deepseekv3" else {}
    messages = [
        Message(role="user", content="What is it?"),
        Message(role="assistant", content="", tool_calls=[call]),
        Message(role="tool", content="the result", name="lookup"),
        Message(role="assistant", content="It is so.", **reasoning),
    ]
    tools = [{"type": "function", "function": {"name": "lookup", "description": "Find.", "parameters": {"type": "object", "properties": {}}}}]
    conversation = Conversation("id", "c", messages, tools)
    if name == "deepseekv3":
        # Its prompt opens a block of reasoning before a call too, which its template can't render.
        with pytest.raises(InputError, match="chat-reasoning"):
            template.encode(conversation)
        return
    encoding = template.encode(conversation)
    learned = [template.tokenizer.decode(row.ids[start:end]) for row, (start, end) in encoding.answers()]
    assert "lookup" in learned[0]
    assert "the result" not in "".join(learned)
    assert "It is so." in learned[1]
    for (row, (start, end)), place in zip(encoding.answers(), (1, 3), strict=True):
        assert row.ids[:start] == template.prompt(messages[:place], tools)
        assert row.ids[end - 1] in template.stop_ids


@pytest.mark.parametrize("name", ["cohere", "gemma3", "phi3", "mistral_v7", "deepseek_r1_distill"])
def test_what_a_template_can_not_show_is_refused_or_dropped_and_counted(name: str) -> None:
    messages = [
        Message(role="user", content="What is it?"),
        Message(role="assistant", content="", tool_calls=[{"type": "function", "function": {"name": "lookup", "arguments": {"key": "abc"}}}]),
    ]
    conversation = Conversation("id", "c", messages)
    with pytest.raises(InputError, match=r"conversation id: .*or set data.on_invalid to drop"):
        made(name).encode(conversation)
    source = STOCK[name]
    dropping = ChatTemplate(stand_in(name, source), chat_params(), on_invalid="drop")
    assert dropping.encode(conversation).dropped == "not_rendered"
    assert dropping.refusal


@pytest.mark.parametrize(
    "answer", [{"reasoning_content": "add"}, {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}]
)
def test_what_the_question_happens_to_say_does_not_stand_for_an_answer(answer: Any) -> None:
    """The template shows neither, and both words are in the rendered text."""
    conversation = Conversation("id", "c", [Message(role="user", content="Please add 2 and 2"), {"role": "assistant", "content": "", **answer}])
    with pytest.raises(InputError, match="chat-text-lost"):
        made("gemma3").encode(conversation)


def test_an_answer_that_is_not_learned_is_shown_and_not_learned() -> None:
    for name in ("llama3", "qwen3"):
        template = made(name)
        conversation = talk(*TURNS[:4])
        conversation.messages[1]["learn"] = False
        ((row, (start, end)),) = template.encode(conversation).answers()
        assert "The answer." in template.tokenizer.decode(row.ids[:start])
        assert TURNS[3] in template.tokenizer.decode(row.ids[start:end])


def test_the_values_of_a_templates_variables_travel_with_it() -> None:
    template = made("qwen3", enable_thinking=False)
    saved = ChatTemplate.saved(template.tokenizer)
    question = [Message(role="user", content="Hello")]
    assert saved.prompt(question) == template.prompt(question)
    assert template.tokenizer.decode(template.prompt(question)).endswith("<think>\n\n</think>\n\n")
    (row,) = template.encode(talk("Hello", "Bye")).rows
    (start, end) = row.spans[0]
    assert template.tokenizer.decode(row.ids[start:end]) == "Bye<|im_end|>"


def test_text_that_a_tokenizer_has_no_tokens_for_is_counted_and_refused_above_a_share() -> None:
    from tests.unit.test_tokenizer_contract import plain_words

    tokenizer = plain_words(["a", "b"], ["[UNK]", "[USER]", "[BOT]", "[END]", "[FREE]"], unk_token="[UNK]", eos_token="[END]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('[BOT]' if m.role == 'assistant' else '[USER]') + m.content }}{{ '[END]' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}[BOT]{% endif %}"
    )
    template = ChatTemplate(tokenizer, chat_params(max_unknown_share=0.1))
    assert template.encode(talk("a b", "b")).lost < template.encode(talk("a b", "東京")).lost
    with pytest.raises(InputError, match=r"\[chat-unknown\] the tokenizer has no tokens for 20 of the 100 characters of the test split \(20.00%\)"):
        template.require_readable(20, 100, "test")
