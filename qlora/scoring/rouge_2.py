"""ROUGE-2: F1 of pairs of neighbouring words."""

from typing import Final, Literal

from qlora.scoring import rouge
from qlora.scoring.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["higher"]] = "higher"


def statistics(answer: str, reference: str) -> list[float]:
    """
    >>> statistics("the cat", "the black cat")
    [0.0, 1.0]
    """
    return rouge.statistics("rouge2", answer, reference)
