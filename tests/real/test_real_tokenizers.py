"""Stock templates with the real tokenizers of their families."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from tests.families import ODD_TEXTS, TURNS, check, settings_of, stock, talk
from tests.helpers import chat_params

REAL = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_nothink", "chatml"), "tokenizers/qwen3"),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "llama3_tokenizer"),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "tokenizers/deepseek_v3"),
}
WHOLE = {"qwen2_5", "qwen3_instruct_2507", "chatml", "llama3", "llama3_1", "llama3_2"}
"""Families whose conversations are one row, where no answer begins with white space."""


@pytest.mark.parametrize("name", REAL)
def test_answers_are_learned_as_serving_shows_them(name: str, real_data: Callable[[str], Path]) -> None:
    tokenizer, own = (load_tokenizer(real_data(REAL[name])) for _ in range(2))
    tokenizer.chat_template = stock()[name]
    template = ChatTemplate(tokenizer, chat_params(template_kwargs=settings_of(stock()[name])))
    reasoning = "It must be so." if name.startswith("deepseek") else None
    texts = [odd + text + odd for odd, text in zip((*ODD_TEXTS, *ODD_TEXTS), TURNS, strict=False)]
    for conversation in (talk(*TURNS, reasoning=reasoning), talk(*texts, reasoning=reasoning), talk(*TURNS, system="Be brief.", reasoning=reasoning)):
        check(template, conversation, name, own)
    assert (len(template.encode(talk(*TURNS, reasoning=reasoning)).rows) == 1) == (name in WHOLE)
