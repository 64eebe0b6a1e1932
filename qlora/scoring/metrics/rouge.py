"""ROUGE (Lin, 2004) as the package rouge-score computes it, but on words of any script: the package's own words are a-z and 0-9 alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from qlora.core.text import words


def of_ngrams(count: int, answer: str, reference: str) -> list[float]:
    """F1 between 0 and 1 of the n-grams of `count` words, each as often as it occurs in both, and 1.

    >>> of_ngrams(2, "a black cat", "the black cat")
    [0.5, 1.0]
    """

    def f1(said: Sequence[str], expected: Sequence[str]) -> float:
        ours, theirs = (Counter(tuple(text[place : place + count]) for place in range(len(text) - count + 1)) for text in (said, expected))
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return _statistics(f1, answer, reference)


def of_longest_common_subsequence(answer: str, reference: str) -> list[float]:
    """F1 between 0 and 1 of the longest common subsequence of words, and 1.

    >>> of_longest_common_subsequence("the cat", "the black cat")
    [0.8, 1.0]
    """
    return _statistics(lambda said, expected: _f1(longest_common_subsequence(said, expected), len(said), len(expected)), answer, reference)


def _statistics(f1: Callable[[Sequence[str], Sequence[str]], float], answer: str, reference: str) -> list[float]:
    """Two texts without a word agree when they are the same."""
    said, expected = words(answer), words(reference)
    if not said and not expected:
        return [float(answer.strip() == reference.strip()), 1.0]
    return [f1(said, expected), 1.0]


def _f1(common: int, said: int, expected: int) -> float:
    """Of numbers of units; in the package's order of operations, so to the same last digit."""
    precision, recall = common / max(said, 1), common / max(expected, 1)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length. The package fills a table cell by cell, three quarters of a second for 2,000 words; here a row is one integer.

    Method: H. Hyyro, Bit-parallel LCS-length computation revisited, 2004.

    >>> longest_common_subsequence("abcbdab", "bdcaba")
    4
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(first) - row.bit_count()
