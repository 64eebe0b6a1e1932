import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.core.conversation import Message
from qlora.data import near_duplicates
from qlora.data.duplicates import normalised
from qlora.data.near_duplicates import BUCKET, MIN_WORDS, PERMUTATIONS, bands_of, jaccard, rows_per_band, signature, spoken, word_pairs

WORDS = [f"word{number}" for number in range(5000)]


def text(rng: random.Random, words: int) -> list[str]:
    return rng.sample(WORDS, words)


def pairs(words: list[str]) -> list[bytes]:
    return word_pairs([" ".join(words).encode()])


def test_pairs_are_neighbouring_words_without_punctuation() -> None:
    long = ["what is it"] * 7
    assert (
        word_pairs([" ".join(long).encode()])
        == word_pairs([text.encode() for text in long])
        == [b"what is", b"is it", b"it what"] * 6
        + [
            b"what is",
            b"is it",
        ]
    )
    assert pairs(["don't-do", "it!"] * MIN_WORDS)[:4] == [b"don t", b"t do", b"do it", b"it don"]
    assert pairs(["a"] * (MIN_WORDS - 1)) == []


def test_a_character_is_a_word_in_scripts_without_spaces() -> None:
    assert word_pairs(["東京は大きい街です".encode() * 3])[:2] == ["東 京".encode(), "京 は".encode()]
    assert len(word_pairs(["ภาษาไทย".encode() * 5])) > MIN_WORDS
    assert word_pairs(["서울은 큰 도시".encode()]) == []  # spaces part words there


@given(st.text(st.characters(codec="ascii"), max_size=300))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_plain_text_has_the_same_words_beside_other_scripts(plain: str) -> None:
    """Both ways of finding words agree."""
    by_bytes = near_duplicates._words(normalised(plain))
    by_letters = near_duplicates._words(normalised(plain + " é"))
    assert by_letters == [*by_bytes, "é".encode()]


def test_the_system_turn_is_not_compared() -> None:
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="A  b"), Message(role="assistant", content="C")]
    assert spoken(messages) == [b"a b", b"c"]


def test_bands_are_as_wide_as_the_threshold_allows() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        rows = rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.995
    assert rows_per_band(0.8) == 6
    assert rows_per_band(0.01) == 1


def test_signatures_estimate_the_similarity() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(50):
        one = text(rng, 200)
        other = one[: rng.randint(20, 199)] + text(rng, 20)
        exact = jaccard(frozenset(pairs(one)), frozenset(pairs(other)))
        same = np.mean(np.array(signature(pairs(one))) == np.array(signature(pairs(other))))
        errors.append(abs(same - exact))
    # The standard deviation of one estimate is at most 0.044.
    assert np.mean(errors) < 0.05


class Rows:
    """Conversations as prepare would hand them over, and the files it would have written."""

    def __init__(self, tmp_path: Path, threshold: float = 0.8) -> None:
        self.index = near_duplicates.NearDuplicates(threshold)
        self.files = {split: (tmp_path / split).open("wb") for split in ("train", "validation", "test")}
        self.threshold = threshold

    def add(self, split: str, path: str, texts: dict[int, list[str]]) -> None:
        made = io.BytesIO()
        ends = []
        for words in texts.values():
            made.write(b'{"messages":[{"role":"user","content":"' + " ".join(words).encode() + b'"}]}\n')
            ends.append(made.tell())
        self.index.add(split, Path(path), list(texts), ends, bands_of([pairs(words) for words in texts.values()], self.threshold))
        self.files[split].write(made.getvalue())

    def found(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        duplicates, leaks = self.index.find(self.files)
        return [pair[:2] for pair in duplicates], [pair[:2] for pair in leaks]


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    made = Rows(tmp_path)
    yield made
    for file in made.files.values():
        file.close()


def changed(rng: random.Random, words: list[str]) -> list[str]:
    place = rng.randrange(len(words))
    return [*words[:place], "other", *words[place + 1 :]]


def test_pairs_are_found_within_the_train_file_and_between_it_and_the_test_file_and_nowhere_else(rows: Rows) -> None:
    rng = random.Random(0)
    a, b, c, d = (text(rng, 60) for _ in range(4))
    rows.add("test", "test", {1: changed(rng, a), 2: text(rng, 60), 3: d, 4: changed(rng, d)})
    rows.add("train", "train", {2: a, 5: b, 6: ["too", "short"]})
    rows.add("validation", "train", {3: changed(rng, b), 4: changed(rng, a)})
    rows.add("train", "train", {7: c})
    assert rows.found() == ([("train: row 4", "train: row 2"), ("train: row 5", "train: row 3")], [("test: row 1", "train: row 2")])
    assert (len(rows.index), rows.index.too_short) == (9, 1)


def test_one_changed_word_of_twenty_is_found_and_half_of_the_words_is_not(rows: Rows) -> None:
    rng = random.Random(1)
    originals = [text(rng, MIN_WORDS + number % 10) for number in range(200)]
    rows.add("train", "train", dict(enumerate(originals)))
    rows.add("train", "train", {200 + number: changed(rng, words) for number, words in enumerate(originals)})
    rows.add("train", "train", {400 + number: words[: len(words) // 2] + text(rng, len(words) // 2) for number, words in enumerate(originals)})
    duplicates, _ = rows.found()
    assert set(duplicates) <= {(f"train: row {200 + number}", f"train: row {number}") for number in range(200)}
    assert len(duplicates) >= 198


def test_similarity_is_that_of_the_pairs(rows: Rows) -> None:
    rng = random.Random(2)
    one = text(rng, 50)
    other = [*one[:-1], "other"]
    rows.add("train", "train", {1: one, 2: other})
    ((pair,), _) = rows.index.find(rows.files)
    assert pair.similarity == 48 / 50
    assert str(pair) == "  train: row 2 ~ train: row 1 (0.96)"


def test_many_rows_of_one_form_are_compared_with_a_few_of_them(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of 300 rows were 45,000 comparisons."""
    compared = []
    exact = near_duplicates.jaccard
    monkeypatch.setattr(near_duplicates, "jaccard", lambda one, other: compared.append(1) or exact(one, other))
    form = text(random.Random(3), 60)
    rows.add("train", "train", {number: [*form, f"number{number}"] for number in range(300)})
    duplicates, _ = rows.found()
    assert len(duplicates) == 299
    assert len(compared) <= 300 * BUCKET


def test_nothing_to_compare_finds_nothing(rows: Rows) -> None:
    rows.add("train", "train", {1: ["short"]})
    assert rows.found() == ([], [])
