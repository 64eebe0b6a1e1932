"""BLEU (Papineni et al., 2002) of a corpus, from 0 to 100, as sacrebleu computes it: 13a words, exponential smoothing.

Characters of scripts without spaces are parted first, so that each is a word. One short answer has a BLEU near 0: read it of many.
"""

from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qlora.words import ALONE

BETTER: Final[Literal["higher"]] = "higher"
ORDERS = 4


@cache
def _metric() -> Any:
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415 - the scores of other commands need not wait for it

    return BLEU()


def statistics(answer: str, reference: str) -> list[float]:
    """Words of the answer and of the reference, then for n from 1 to 4 common n-grams and n-grams of the answer."""
    parted = [ALONE.sub(lambda found: f" {found.group()} ", text) for text in (answer, reference)]
    (found,) = _metric()._extract_corpus_statistics(parted[:1], [parted[1:]])
    return [float(count) for count in found]


def value(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(..., 10) -> (...): the brevity penalty times the geometric mean of the precisions; the k-th that is 0 counts as 1 in 2^k."""
    sums = np.asarray(sums, dtype=np.float64)
    answered, expected = sums[..., 0], sums[..., 1]
    common, total = sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    missed = (common == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, -1), common)
    scored = np.asarray(common.any(-1) & (total > 0).all(-1))
    precisions = np.divide(smoothed, total, out=np.ones_like(total), where=scored[..., None])
    shortage = 1 - np.divide(expected, answered, out=np.ones_like(answered), where=answered > 0)
    return np.where(scored, 100 * np.exp(np.log(precisions).mean(-1) + np.minimum(shortage, 0)), 0.0)
