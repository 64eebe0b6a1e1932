"""Section `sequence`: how conversations become rows of tokens."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class SequenceParams(Section):
    max_length: int = Field(ge=8)
    """Tokens in a row. Activation memory grows linearly with it."""
    on_too_long: Literal["drop", "error"]
    """A conversation of more than max_length tokens is dropped and counted, or ends the run; it is never cut unseen."""
    packing: bool
    """Several whole conversations in a row, unable to see each other: no padding, two to three times the speed."""
    assistant_only_loss: bool
    """The loss counts the assistant's tokens alone, of every turn; false: every token of the row."""
