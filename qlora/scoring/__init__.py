"""How an answer is compared with its reference: one file per score, one line per score in SCORES. Higher is better."""

from collections.abc import Callable

from qlora.scoring import exact_match, rouge_l

SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match.score,
    "rouge_l": rouge_l.score,
}
