import pytest

from qlora.scoring import SCORES

# name: (answer, reference, score worked out by hand)
FIXTURES: dict[str, list[tuple[str, str, float]]] = {
    "exact_match": [("42", "42", 1.0), (" 42\n", "42", 1.0), ("42.", "42", 0.0), ("a", "A", 0.0)],
    # Longest common subsequence 2 of 2 and 3 words: precision 1, recall 2/3, F1 0.8.
    "rouge_l": [("the cat", "the black cat", 0.8), ("", "a", 0.0), ("Ömer", "ömer", 1.0), ("да нет", "да", 2 / 3)],
}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_gives_the_answer_worked_out_by_hand(name: str) -> None:
    for answer, reference, expected in FIXTURES[name]:
        assert SCORES[name](answer, reference) == pytest.approx(expected), (answer, reference)
