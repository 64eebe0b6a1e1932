"""Characters of the answers over those of the references: 1 is the same length."""

from typing import Final, Literal

from qlora.scoring.metrics.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["neither"]] = "neither"


def statistics(answer: str, reference: str) -> list[float]:
    """
    >>> statistics("no", "indeed")
    [2.0, 6.0]
    """
    return [float(len(answer.strip())), float(len(reference.strip()))]
