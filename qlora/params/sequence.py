"""Section `sequence`: how conversations become rows of tokens."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class SequenceParams(Section):
    max_length: int = Field(ge=8)
    """Tokens in a row. Activation memory grows linearly with it."""
    on_too_long: Literal["drop", "truncate", "split", "error"]
    """A conversation of more than max_length tokens is dropped; or keeps its first max_length tokens, if one of them is supervised; or
    becomes several examples, the later ones without what was said before; or ends the run. All of it is counted in reports/train.json."""
    packing: Literal["bfd", "none"]
    """bfd: several whole conversations in a row, unable to see each other, by best-fit decreasing: no padding, two to three times the
    speed. none: one conversation a row."""
    assistant_only_loss: bool
    """The loss counts the assistant's tokens alone, of every turn; false: every token of the row."""
