"""ROUGE-2: F1 of pairs of neighbouring words."""

from typing import Final, Literal

from qlora.scoring.metrics import rouge
from qlora.scoring.metrics.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["higher"]] = "higher"


def statistics(answer: str, reference: str) -> list[float]:
    """
    >>> statistics("the cat", "the black cat")
    [0.0, 1.0]
    """
    return rouge.of_ngrams(2, answer, reference)
