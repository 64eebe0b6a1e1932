"""Section `chat`: how a conversation becomes text."""

from typing import Literal

from pydantic import Field, JsonValue, field_validator

from qlora.params.section import Section

RESERVED = frozenset(
    (
        *("true", "false", "none", "and", "or", "not", "in", "is", "if", "else", "for", "set", "loop", "self", "caller"),
        *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "namespace", "range", "dict"),
    )
)
"""What a template is given whatever the params say."""


class ChatParams(Section):
    template: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """model: the base model's own chat template. Any other name: the file of that name in qlora/model/chat_templates, such as vicuna, plain
    `Human:` and `Assistant:` turns for a base model without a template."""
    on_control_tokens: Literal["error", "drop", "escape"]
    """A message that contains the text of a control token, or of what a plain template puts between turns, ends the run, is dropped
    with its conversation and counted, or is read as the text that it is. Nothing in a message ever becomes structure."""
    template_kwargs: dict[str, JsonValue]
    """Values of the template's own variables, such as {enable_thinking: false}: the same in training, predictions, chat and wherever the model is
    served, because they are written into the template that travels with it. strftime_now: the text that a template gets for today's date."""
    max_unknown_share: float = Field(ge=0, le=1)
    """Share of the characters of a dataset that the tokenizer may have no token for. More ends the run; above a thousandth it warns."""

    @field_validator("template_kwargs")
    @classmethod
    def _are_variables(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in values:
            if not name.isidentifier() or name.lower() in RESERVED or name.endswith("_token"):
                raise ValueError(f"a mapping of the chat template's own variables; {name!r} is none of them")
        return values
