"""Chat templates of model families as they are shipped, each with a tokenizer that has the family's control tokens."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora.core.conversation import Conversation, Message
from qlora.model.chat_template import ChatTemplate, Encoding

FOLDER = Path(trl.__file__).parent / "chat_templates"
"""Byte copies of the templates of some thirty families."""
VISION = ("idefics3", "llava_next", "smolvlm", "qwen2_5_vl", "qwen3_vl", "lfm2_2_5_vl")
# The published forms of families that TRL has no copy of.
MISTRAL_V3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PLAIN = {"mistral_v0.3": MISTRAL_V3, "mistral_v7": MISTRAL_V7, "llama2": LLAMA2, "chatml": CHATML, "phi4": PHI4}
EOS = {
    "gptoss": "<|return|>",
    "glm": "<|endoftext|>",
    "llama2": "</s>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|endoftext|>",
    "gemma": "<eos>",
    "diffusion_gemma": "<eos>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
}
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens of Qwen and others that their tokenizers don't call special."""
TOKEN = re.compile(
    r"<\|[\w/ ]+\|>|<｜[^<>｜]+｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"
    r"|<\|?(?:turn|channel|tool_call|tool|tool_response)\|?>|\[gMASK\]|<sop>|\[/?(?:INST|SYSTEM_PROMPT)\]"
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where Llama 3 and Qwen cut a text before they merge bytes."""


def stock() -> dict[str, str]:
    """Every template for text chat of the installed TRL, and the plain forms, by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    return {
        name: (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in names if not name.endswith("_training") and name not in VISION
    } | PLAIN


def stand_in(name: str, source: str) -> Any:
    """A byte-level BPE tokenizer with the tokens of the family."""
    eos = next((token for family, token in EOS.items() if name.startswith(family)), "<|im_end|>")
    found = {*TOKEN.findall(source), eos, "<bos>", "<pad>"}
    # Llama 2 has no tokens but BOS and EOS.
    found -= {"[INST]", "[/INST]"} if name == "llama2" else set()
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["The quick brown fox. What is the answer?\n\n\n Be brief.\n\n  - done\n"] * 20, trainer)
    # Gemma's line break is an added token.
    added = sorted(found) + (["\n"] if "gemma" in name else [])
    # Phi 3's tokens take the white space after them in.
    strips = name.startswith("phi3")
    tokenizer.add_tokens(
        [AddedToken(token, special=token not in (*NOT_SPECIAL, "\n"), normalized=False, rstrip=strips and token != eos) for token in added]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = source
    return fast


def settings_of(source: str) -> Mapping[str, Any]:
    """What has to be fixed before the template is a function of its conversation."""
    return {"strftime_now": "26 Jul 2024"} if "strftime_now(" in source else {}


NO_SWITCH = {"deepseek_r1_distill", "deepseekv3"}
"""Their templates have no variable by which reasoning is switched off."""
ODD_TEXTS = ("\n\n Hello \n", "\n- one\n- two\n\n", "  ", "x  ")
TURNS = ("What is it?", "The answer.", "And?", "東京 🙂 naïve", "Why?", "Done.")


def talk(*contents: str, system: str | None = None, reasoning: str | None = None) -> Conversation:
    messages = [Message(role=("user", "assistant")[number % 2], content=content) for number, content in enumerate(contents)]
    if reasoning:
        messages = [Message(**message, reasoning_content=reasoning) if message["role"] == "assistant" else message for message in messages]
    return Conversation("id", "c", [*([Message(role="system", content=system)] if system else []), *messages])


def check(template: ChatTemplate, conversation: Conversation, name: str, own: Any, **kwargs: Any) -> Encoding:
    """Each prompt is the one that serving shows, and what is learned is what the template writes after it, with one end of turn.

    Args:
        own: A tokenizer of the same kind, that renders as a server would.
    """
    encoding = template.encode(conversation)
    source = stock()[name]
    given = {"chat_template": template.tokenizer.chat_template} if settings_of(source) else {"chat_template": source, **kwargs}
    answers = list(encoding.answers())
    assert len(answers) == sum(message["role"] == "assistant" for message in conversation.messages)
    for (row, (start, end)), place in zip(answers, conversation.assistant_turns(), strict=True):
        history = [dict(message) for message in conversation.messages]
        served = own.apply_chat_template(history[:place], add_generation_prompt=True, tokenize=True, return_dict=True, **given)["input_ids"]
        assert row.ids[:start] == served
        prompt = own.apply_chat_template(history[:place], add_generation_prompt=True, tokenize=False, **given)
        whole = own.apply_chat_template(history[: place + 1], tokenize=False, **given)
        learned = own.decode(row.ids[start:end])
        assert sum(token in template.stop_ids for token in row.ids[start:end]) == 1
        assert row.ids[end - 1] in template.stop_ids
        assert conversation.messages[place]["content"].strip() in learned
        # Mistral v0.3 writes the system text into the last turn if that is a user's, and nowhere else.
        if name not in NO_SWITCH and not (name == "mistral_v0.3" and conversation.messages[0]["role"] == "system"):
            stop = own.decode(row.ids[end - 1 : end])
            written = whole.removeprefix(prompt).partition(stop)[0]
            # Phi 3's <|assistant|> takes in the white space that follows it.
            assert learned.removesuffix(stop) == (written.lstrip() if name.startswith("phi3") else written)
    assert encoding.lost == 0
    return encoding
