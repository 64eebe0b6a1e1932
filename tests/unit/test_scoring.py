"""Each score by hand, and as its package publishes it."""

import random
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from qlora.scoring import SCORES
from qlora.scoring.rouge import longest_common_subsequence
from qlora.words import words


def scored(name: str, *pairs: tuple[str, str]) -> float:
    """The score of a corpus of (answer, reference)."""
    return float(SCORES[name].value(np.sum([SCORES[name].statistics(*pair) for pair in pairs], axis=0)))


# name: (answer, reference, score worked out by hand)
FIXTURES: dict[str, list[tuple[str, str, float]]] = {
    "exact_match": [("42", "42", 1.0), (" 42\n", "42", 1.0), ("42.", "42", 0.0), ("a", "A", 0.0)],
    # 2 words in common of 2 and 3: precision 1, recall 2/3, F1 0.8.
    "token_f1": [
        ("the cat", "the black cat", 0.8),
        ("cat the", "the cat", 1.0),
        ("a a", "a", 2 / 3),
        ("東京", "東大", 0.5),
        ("!", "!", 1.0),
        ("!", "?", 0.0),
    ],
    "rouge_1": [("the cat", "the black cat", 0.8), ("cat the", "the cat", 1.0), ("東京", "東大", 0.5), ("カタ", "カナ", 0.5)],
    # Pairs "the black", "black cat" against "a black", "black cat".
    "rouge_2": [("a black cat", "the black cat", 0.5), ("cat", "cat", 0.0), ("東京大学", "東京大阪", 2 / 3)],
    "rouge_l": [
        ("the cat", "the black cat", 0.8),
        ("", "a", 0.0),
        ("Ömer", "ömer", 1.0),
        ("да нет", "да", 2 / 3),
        ("ไทย", "ไทย", 1.0),
        ("👍", "👍", 1.0),
        ("👍", "!", 0.0),
    ],
    # Of "ab" and "ac" one of two characters is common, of the pairs none: the mean precision and recall are 1/4.
    "chrf": [("ab", "ac", 25.0), ("東京は", "東京は", 100.0), ("", "a", 0.0)],
    "bleu": [
        ("a b c d", "a b c d", 100.0),
        # 1-grams 4 of 5, 2-grams 3 of 4, 3-grams 2 of 3, 4-grams 1 of 2, as long as the reference.
        ("a b c d x", "a b c d e", 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        # One word shorter than 5: brevity exp(1 - 5 / 4).
        ("a b c d", "a b c d e", 100 * np.exp(-1 / 4)),
        # No 3-gram and no 4-gram in common: those count as 1/2 and 1/4.
        ("a b x y", "a b c d", 100 * (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)),
        ("東京大学", "東京大学", 100.0),
        ("a b c", "a b c", 0.0),
        ("", "a", 0.0),
    ],
    "length_ratio": [("no", "indeed", 1 / 3), (" ab ", "ab", 1.0), ("a", " ", 0.0)],
}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_gives_the_value_worked_out_by_hand(name: str) -> None:
    for answer, reference, expected in FIXTURES[name]:
        assert scored(name, (answer, reference)) == pytest.approx(expected), (answer, reference)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_declares_its_direction_and_has_as_many_statistics_for_every_answer(name: str) -> None:
    assert SCORES[name].BETTER in ("higher", "lower", "neither")
    assert len({len(SCORES[name].statistics(*pair)) for pair in (("", ""), ("a", "b"), ("a b c", "東京"))}) == 1


# https://github.com/google-research/google-research/tree/master/rouge
ROUGE = ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
# https://github.com/mjpost/sacrebleu, its Python example with two references
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
]


@pytest.mark.parametrize(("name", "expected"), [("rouge_1", 12 / 17), ("rouge_l", 10 / 17)])
def test_rouge_agrees_with_its_published_example(name: str, expected: float) -> None:
    assert scored(name, ROUGE) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "metric", "expected"), [("bleu", BLEU(), 48.53), ("chrf", CHRF(), 59.73)])
def test_the_values_of_sums_agree_with_sacrebleus_published_example(name: str, metric: Any, expected: float) -> None:
    """Its statistics of two references, our value of their sums."""
    sums = np.sum(metric._extract_corpus_statistics(SYSTEM, REFERENCES), axis=0)
    assert float(SCORES[name].value(sums)) == pytest.approx(expected, abs=0.005)
    assert float(SCORES[name].value(sums)) == pytest.approx(metric.corpus_score(SYSTEM, REFERENCES).score)


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_corpora_score_as_sacrebleu_scores_them(name: str, metric: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        pairs = [
            tuple(" ".join(rng.choices(["a", "b", "c", "d", "e,", "f.", "Gh"], k=rng.randint(0, 9))) for _ in range(2))
            for _ in range(rng.randint(1, 5))
        ]
        answers, references = zip(*pairs, strict=True)
        expected = metric.corpus_score(list(answers), [list(references)]).score
        assert scored(name, *pairs) == pytest.approx(expected, abs=1e-9), pairs


def test_values_are_of_each_row_of_sums() -> None:
    """As the bootstrap asks for them: thousands of sums at once."""
    rng = random.Random(1)
    for name, score in SCORES.items():
        rows = np.array([score.statistics(*(" ".join(rng.choices("abcdef", k=rng.randint(0, 9))) for _ in range(2))) for _ in range(20)])
        assert score.value(rows) == pytest.approx([float(score.value(row)) for row in rows]), name


def test_words_are_those_of_any_script() -> None:
    assert words("Don't go to 東京, наïve_x") == ["don", "t", "go", "to", "東", "京", "наïve", "x"]


def test_vowel_marks_belong_to_their_word() -> None:
    assert words("मुझे हिन्दी किताब") == ["मुझे", "हिन्दी", "किताब"]
    assert words("كِتَاب كُتُب") == ["كِتَاب", "كُتُب"]
    assert words("தமிழ் சொல்") == ["தமிழ்", "சொல்"]
    assert words("cafe\u0301 x") == ["cafe\u0301", "x"]


def test_the_longest_common_subsequence_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import _lcs_table

    rng = random.Random(0)
    for _ in range(300):
        texts = [[rng.choice("abcdefg"[: rng.randint(1, 7)]) for _ in range(rng.randint(0, 90))] for _ in range(2)]
        assert longest_common_subsequence(*texts) == _lcs_table(*texts)[-1][-1]
