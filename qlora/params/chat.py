"""Section `chat`: how a conversation becomes text."""

from typing import Literal

from qlora.params.section import Section


class ChatParams(Section):
    template: Literal["model", "vicuna"]
    """model: the base model's own chat template. vicuna: plain `Human:` and `Assistant:` turns, for a base model without one."""
