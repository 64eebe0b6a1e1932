"""Section `evaluate`: what only scoring reads. A change runs `evaluate` alone, in seconds and without a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.params.section import Section

Headline = Literal[
    "exact_match",
    "token_f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "chrf",
    "bleu",
    "length_ratio",
    "stop_rate",
    "answer_tokens",
    "nll",
    "perplexity",
    "bits_per_byte",
    "eval_loss",
]
MOST_METRICS = 8
"""More do not fit a terminal of 120 columns in `dvc exp show`."""


class EvaluateParams(Section):
    headline: Annotated[list[Headline], Field(min_length=1, max_length=MOST_METRICS)]
    """Metrics of the tuned model in metrics/evaluate.json, which `dvc exp show` and `dvc metrics diff` show, in this order. eval_loss is the
    validation loss of the published step. Everything else that is measured is in reports/evaluation.json."""
    resamples: int = Field(ge=1000)
    """Bootstrap resamples behind each 95 % interval. 10,000 take a second; fewer make the last digits of an interval noisy."""

    @model_validator(mode="after")
    def _metrics_differ(self) -> "EvaluateParams":
        if len(set(self.headline)) < len(self.headline):
            raise ValueError(f"headline = {self.headline} lists a metric twice")
        return self
