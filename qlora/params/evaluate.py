"""Section `evaluate`: how base and tuned model answer the test set."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class EvaluateParams(Section):
    max_new_tokens: int = Field(gt=0)
    """An answer is cut there and then counts as not stopped."""
    do_sample: bool
    """false: greedy, the same answers every time, which is what to decide on. true: drawn with temperature and top_p."""
    temperature: float = Field(gt=0)
    """Only read when do_sample is true."""
    top_p: float = Field(gt=0, le=1)
    """Only read when do_sample is true."""
    seed: int = Field(ge=0, lt=2**32)
    """Of the drawn answers."""
    batch_size: int = Field(gt=0)
    """Prompts answered together. Speed grows with it, memory too."""
    on_too_long: Literal["drop", "error"]
    """A conversation longer than the model's context is left out and counted, or ends the run."""
