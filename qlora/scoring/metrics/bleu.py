"""BLEU (Papineni et al., 2002) of a corpus, from 0 to 100, as sacrebleu computes it, with exponential smoothing.

Words are those of sacrebleu's tokenizer 13a. Where the answer or its reference holds a character of a script without spaces or CJK punctuation,
the words of both are those of its tokenizer zh, and kana, Thai and the like are words of one character too, which zh leaves whole. Answers
without a single 4-gram have no BLEU: the precision of their 4-grams is not defined. One short answer has a BLEU near 0: read it of many.
"""

from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import regex

from qlora.core.text import ALONE

BETTER: Final[Literal["higher"]] = "higher"
ORDERS = 4
SPACELESS = regex.compile(rf"{ALONE.pattern}|[\u2e80-\u303f\u3100-\u312f\u31a0-\u31ef\u3200-\u33ff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef]")
"""Characters of scripts without spaces, and CJK radicals, strokes, punctuation, phonetic and enclosed signs, full-width forms."""


@cache
def _metric(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415 - the scores of other commands need not wait for it

    return BLEU(tokenize=tokenizer)


def statistics(answer: str, reference: str) -> list[float]:
    """Words of the answer and of the reference, then for n from 1 to 4 common n-grams and n-grams of the answer."""
    texts = [answer, reference]
    spaceless = any(SPACELESS.search(text) for text in texts)
    if spaceless:
        texts = [ALONE.sub(lambda found: f" {found.group()} ", text) for text in texts]
    (found,) = _metric("zh" if spaceless else "13a")._extract_corpus_statistics(texts[:1], [texts[1:]])
    return [float(count) for count in found]


def value(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(..., 10) -> (...): the brevity penalty times the geometric mean of the precisions; the k-th that is 0 counts as 1 in 2^k.

    NaN, not defined, where the answers hold no n-gram of some order; 0 where none is common.
    """
    sums = np.asarray(sums, dtype=np.float64)
    answered, expected = sums[..., 0], sums[..., 1]
    common, total = sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    missed = (common == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, -1), common)
    is_defined = (total > 0).all(-1)
    scored = np.asarray(common.any(-1) & is_defined)
    precisions = np.divide(smoothed, total, out=np.ones_like(total), where=scored[..., None])
    shortage = 1 - np.divide(expected, answered, out=np.ones_like(answered), where=answered > 0)
    found = np.where(scored, 100 * np.exp(np.log(precisions).mean(-1) + np.minimum(shortage, 0)), 0.0)
    return np.where(is_defined, found, np.nan)
