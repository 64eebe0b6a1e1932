"""ROUGE-1: F1 of words."""

from typing import Final, Literal

from qlora.scoring.metrics import rouge
from qlora.scoring.metrics.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["higher"]] = "higher"


def statistics(answer: str, reference: str) -> list[float]:
    """
    >>> statistics("the cat", "the black cat")
    [0.8, 1.0]
    """
    return rouge.of_ngrams(1, answer, reference)
