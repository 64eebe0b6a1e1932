"""F1 of the bags of words (Rajpurkar et al., SQuAD, 2016), in any script and without taking English articles out."""

from collections import Counter
from typing import Final, Literal

from qlora.core.text import words
from qlora.scoring.metrics.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["higher"]] = "higher"


def statistics(answer: str, reference: str) -> list[float]:
    """F1 between 0 and 1, and 1. Two texts without a word agree when they are the same.

    >>> statistics("the cat", "the black cat")
    [0.8, 1.0]
    """
    said, expected = Counter(words(answer)), Counter(words(reference))
    if not said or not expected:
        return [float(answer.strip() == reference.strip()), 1.0]
    return [2 * (said & expected).total() / (said.total() + expected.total()), 1.0]
