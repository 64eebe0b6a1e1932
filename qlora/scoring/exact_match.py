"""Whether an answer is the reference, white space at both ends aside."""


def score(answer: str, reference: str) -> float:
    """1.0 or 0.0.

    >>> score(" 42\\n", "42")
    1.0
    """
    return float(answer.strip() == reference.strip())
