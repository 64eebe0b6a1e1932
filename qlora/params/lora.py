"""Section `lora`: the adapter."""

from typing import Annotated, Literal

from pydantic import Field

from qlora.params.section import Section


class LoraParams(Section):
    r: int = Field(gt=0)
    """Rank of the update. Adapter size and optimizer memory grow linearly with it."""
    lora_alpha: int = Field(gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    """all-linear: every linear layer but the output head; or names such as [q_proj, v_proj]."""
