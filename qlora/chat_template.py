"""Conversations as tokens: the one place for training, evaluation and chat, so that all three see the same ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora.conversation import Conversation, Message
from qlora.errors import InputError
from qlora.params.chat import ChatParams

VICUNA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] | trim }}
    {%- elif message['role'] == 'user' %}
        {{- '\\n\\nHuman: ' + message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\nAssistant:' }}
        {%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
"""Plain text for a base model without a template of its own. The prompt ends in ':' and the answer begins with the
space: a prompt that ended in a space would start the model from a token that training never showed."""
VICUNA_DELIMITERS = ("\n\nHuman:", "\n\nAssistant:")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens.

    `spans` holds one (start, end) per assistant turn: ids[:start] is its prompt, ids[start:end] the answer and the token
    that ends the turn.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations with one tokenizer and one template, and refuses what would teach something wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatParams) -> None:
        """Set `tokenizer.chat_template` to the template in use, so that it is saved with the adapter.

        Raises:
            InputError: the model has no template, or one that does not tell which tokens are the assistant's.
        """
        self.tokenizer = tokenizer
        # all_special_tokens would be the named ones alone: Llama 3 has 250 more.
        self._control = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        structure = [*self._control.values(), *(VICUNA_DELIMITERS if chat.template == "vicuna" else ())]
        self._structure = re.compile("|".join(map(re.escape, structure)))
        tokenizer.chat_template = VICUNA if chat.template == "vicuna" else _own_template(tokenizer)
        self.end_of_turn = self._check_gates()

    def encode(self, conversation: Conversation) -> Encoded:
        """Raises InputError when a message contains the text of a control token, which would become structure."""
        for message in conversation.messages:
            if found := self._structure.search(message["content"]):
                raise InputError(
                    "chat-control-token",
                    f"conversation {conversation.id}: a {message['role']} turn contains {found.group()!r}, which the chat template "
                    "takes for structure. Remove the row from the raw data, or that text from the row.",
                )
        encoded = self._render(conversation.messages)
        turns = sum(1 for _ in conversation.assistant_turns())
        if len(encoded.spans) != turns:
            raise InputError(
                "chat-spans", f"conversation {conversation.id}: the chat template marks {len(encoded.spans)} answers, the conversation has {turns}"
            )
        return encoded

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the model writes its next turn."""
        return self._apply(messages, add_generation_prompt=True)["input_ids"]

    def _render(self, messages: Sequence[Message]) -> Encoded:
        rendered = self._apply(messages, return_assistant_tokens_mask=True)
        return Encoded(rendered["input_ids"], spans_of(rendered["assistant_masks"]))

    def _apply(self, messages: Sequence[Message], **options: bool) -> dict[str, list[int]]:
        tokenizer: Any = self.tokenizer
        try:
            return dict(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options))
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise InputError(
                "chat-template", f"the chat template refuses roles {roles}: {error}. If it knows no system turn, set data.system_message to null."
            ) from None

    def _check_gates(self) -> int:
        """The token that ends every answer, after the template was tried on a conversation of its own.

        Raises:
            InputError: not exactly one BOS, no end of turn that is learned, or a prompt that training never shows.
        """
        probe = [Message(role=role, content=content) for role, content in (("user", "Hello"), ("assistant", "Good day"), ("user", "And?"))]
        first = self._render(probe[:2])
        both = self._render([*probe, Message(role="assistant", content="Bye")])
        if len(first.spans) != 1 or len(both.spans) != 2:
            raise InputError("chat-spans", "the chat template does not mark the assistant's tokens ({% generation %}): use chat.template: vicuna")
        ends = {both.ids[end - 1] for _, end in both.spans}
        if len(ends) != 1 or not ends <= set(self._control):
            names = self.tokenizer.convert_ids_to_tokens(sorted(ends))
            raise InputError("chat-no-stop", f"an answer ends with {names} under this chat template: no single control token tells the model to stop")
        bos = self.tokenizer.bos_token_id
        if bos is not None and both.ids.count(bos) != 1 and bos not in ends:
            raise InputError("chat-bos", f"the chat template writes {both.ids.count(bos)} BOS tokens ({self.tokenizer.bos_token!r}), expected one")
        for messages, encoded, span in ((probe[:1], first, 0), (probe, both, 1)):
            prompt, trained = self.prompt(messages), encoded.ids[: encoded.spans[span][0]]
            if prompt != trained:
                tokens = self.tokenizer.convert_ids_to_tokens
                raise InputError(
                    "chat-prompt",
                    f"the generation prompt is not what training shows before an answer:\n  prompt   {tokens(prompt)}\n  training {tokens(trained)}",
                )
        return ends.pop()


def spans_of(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of ones as (start, end).

    >>> spans_of([0, 1, 1, 0, 1])
    [(1, 3), (4, 5)]
    """
    edges = [index for index, (before, after) in enumerate(zip((0, *mask), (*mask, 0), strict=True)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The model's template; where it does not mark the assistant's tokens, TRL's training template of the same family."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError("chat-no-template", "the base model has no chat template: set chat.template to vicuna, or choose an instruct model")
    if "generation" in template and "endgeneration" in template:
        return str(template)
    from trl.chat_template_utils import get_training_chat_template  # noqa: PLC0415 - five seconds that most runs need not pay

    try:
        patched = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise InputError(
            "chat-no-markers", f"the base model's chat template does not mark the assistant's tokens, and TRL knows none of its family: {error}"
        ) from None
    return str(patched or template)
