"""How an answer is compared with its reference: one file per score, one line per score in SCORES.

A score is a function of sums: each answer has a few statistics, and the score of any set of answers is `value` of their sums. So one
answer, a category, the whole test set and a bootstrap's resample of it are scored alike, a mean (value and 1) as well as BLEU.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy.typing as npt

from qlora.scoring.metrics import bleu, chrf, exact_match, length_ratio, rouge_1, rouge_2, rouge_l, token_f1

Array = npt.NDArray  # type: ignore[type-arg]
Direction = Literal["higher", "lower", "neither"]


class Score(Protocol):
    """What a file of this folder holds."""

    @property
    def BETTER(self) -> Direction:  # noqa: N802 - a constant of a module
        """Which of two values is the better one."""

    def statistics(self, answer: str, reference: str) -> Sequence[float]:
        """Numbers of one answer that may be summed over answers; always as many."""

    def value(self, sums: Array) -> Array:
        """The score of each set of answers: (..., statistics) -> (...)."""


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
    "length_ratio": length_ratio,
}
