"""Whether an answer is the reference, white space at both ends aside."""

from typing import Final, Literal

from qlora.scoring.metrics.ratio import ratio as value

__all__ = ["BETTER", "statistics", "value"]

BETTER: Final[Literal["higher"]] = "higher"


def statistics(answer: str, reference: str) -> list[float]:
    """1 or 0, and 1.

    >>> statistics(" 42\\n", "42")
    [1.0, 1.0]
    """
    return [float(answer.strip() == reference.strip()), 1.0]
