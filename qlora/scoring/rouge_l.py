"""ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004), computed by rouge-score."""

import re
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer


class WordTokenizer(Tokenizer):  # type: ignore[misc]
    """Lower-case words of any script. The package's own tokenizer knows a-z and 0-9 alone and scores all else as empty."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=WordTokenizer())


def score(answer: str, reference: str) -> float:
    """Between 0 and 1.

    >>> score("the cat", "the black cat")
    0.8
    """
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)
