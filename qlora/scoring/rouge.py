"""ROUGE (Lin, 2004) as rouge-score computes it, on words of any script; the package's own words are a-z and 0-9 alone."""

from functools import cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from qlora.words import words


class _Words(Tokenizer):  # type: ignore[misc]
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _scorer(kind: str) -> Any:
    return RougeScorer([kind], tokenizer=_Words())


def statistics(kind: str, answer: str, reference: str) -> list[float]:
    """F1 between 0 and 1 of rouge1, rouge2 or rougeL, and 1."""
    return [float(_scorer(kind).score(reference, answer)[kind].fmeasure), 1.0]
