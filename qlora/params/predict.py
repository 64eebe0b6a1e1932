"""Section `predict`: how base and tuned model answer the test set. A change runs `baseline` and `predict` again."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.params.section import Section


class PredictParams(Section):
    max_new_tokens: int = Field(gt=0)
    """An answer is cut there and then counts as not stopped."""
    do_sample: bool
    """false: greedy, the same answers every time, which is what to decide on. true: drawn with temperature and top_p."""
    temperature: float = Field(gt=0)
    """Only read when do_sample is true."""
    top_p: float = Field(gt=0, le=1)
    """Only read when do_sample is true."""
    generation_seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    """Of the drawn answers. Each turn is answered once per seed, and the deviation between seeds says what is noise. Greedy answers need one."""
    turns: Literal["all", "last"]
    """Which assistant turns are answered, each after its true history. Likelihood is always of all."""
    num_examples: int | None = Field(gt=0)
    """Conversations measured, chosen by the hash that is their id; null: all of the test set."""
    batch_tokens: int = Field(gt=0)
    """Prompts answered together: as many as keep rows x (longest prompt + max_new_tokens) within it; a longer prompt is answered alone. Speed and
    memory grow with it. Another value can change the last bits of a logit, and so an answer: it is never taken from the machine. `python -m
    tools.preflight` recommends one."""
    on_too_long: Literal["drop", "error"]
    """A conversation longer than the model's context is left out and counted, or ends the run."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> "PredictParams":
        if len(set(self.generation_seeds)) < len(self.generation_seeds):
            raise ValueError(f"generation_seeds = {self.generation_seeds} holds one twice")
        if len(self.generation_seeds) > 1 and not self.do_sample:
            raise ValueError("generation_seeds holds several, but greedy answers (do_sample: false) are the same for each: keep one")
        return self
