"""Section `chat`: how a conversation becomes text."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class ChatParams(Section):
    template: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """model: the base model's own chat template. Any other name: the file of that name in qlora/model/chat_templates, such as vicuna, plain
    `Human:` and `Assistant:` turns for a base model without a template."""
    on_control_tokens: Literal["error", "drop", "escape"]
    """A message that contains the text of a control token, or of what a plain template puts between turns, ends the run, is dropped
    with its conversation and counted, or is read as the text that it is. Nothing in a message ever becomes structure."""
