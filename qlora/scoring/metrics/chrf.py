"""chrF2 (Popovic, 2015) of a corpus, from 0 to 100, as sacrebleu computes it: F-score of character n-grams, so every script will do."""

from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

BETTER: Final[Literal["higher"]] = "higher"


@cache
def _metric() -> Any:
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415 - the scores of other commands need not wait for it

    return CHRF()


def statistics(answer: str, reference: str) -> list[float]:
    """n-grams of the answer, of the reference, and common ones, for n from 1 to 6."""
    (found,) = _metric()._extract_corpus_statistics([answer], [[reference]])
    return [float(count) for count in found]


def value(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(..., 18) -> (...): the F-score, recall twice as important, of precision and recall averaged over the orders that both texts have."""
    answered, expected, common = (np.asarray(sums, dtype=np.float64)[..., place::3] for place in range(3))
    there = (answered > 0) & (expected > 0)
    orders = np.maximum(there.sum(-1), 1)
    precision = np.divide(common, answered, out=np.zeros_like(common), where=there).sum(-1) / orders
    recall = np.divide(common, expected, out=np.zeros_like(common), where=there).sum(-1) / orders
    bottom = 4 * precision + recall
    score: npt.NDArray[np.float64] = np.divide(5 * precision * recall, bottom, out=np.zeros_like(bottom), where=bottom > 0)
    return 100 * score
