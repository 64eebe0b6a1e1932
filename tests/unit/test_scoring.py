"""Each score by hand, and as its package publishes it."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from qlora.core.text import words
from qlora.scoring.metrics import SCORES
from qlora.scoring.metrics.rouge import longest_common_subsequence

ROOT = Path(__file__).parents[2]
NOT_DEFINED = float("nan")


def as_sacrebleu(score: float) -> float:
    """It gives 0 where we say that a score is not defined."""
    return 0.0 if np.isnan(score) else score


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
        # Nothing in common, and no 4-gram at all.
        ("a b c d", "e f g h", 0.0),
        ("a b c", "a b c", NOT_DEFINED),
        ("", "a", NOT_DEFINED),
    ],
    "length_ratio": [("no", "indeed", 1 / 3), (" ab ", "ab", 1.0), ("a", " ", NOT_DEFINED)],
}


@pytest.mark.parametrize("name", SCORES)
def test_every_score_gives_the_value_worked_out_by_hand(name: str) -> None:
    for answer, reference, expected in FIXTURES[name]:
        assert scored(name, (answer, reference)) == pytest.approx(expected, nan_ok=True), (answer, reference)


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
        assert as_sacrebleu(scored(name, *pairs)) == pytest.approx(expected, abs=1e-9), pairs


CHINESE = [
    ("我喜欢用 Python。", "我喜欢用 Python！"),
    ("我喜欢用“Python”写程序。", "我喜欢用Python写“程序”。"),
    ("他说：「今天天气很好。」", "他说：“今天天气很好！”"),
    ("请访问 https://example.com/a?b=1，谢谢。", "请访问 https://example.com/a?b=2, 谢谢!"),
    ("价格是3.14元（含税），共1,000件。", "价格是 3.14 元(含税)，共 1,000 件。"),
    ("我——你——他……都去了", "我—你—他…都去了"),
    ("第①步：打开文件；第②步：保存。", "第①步，打开文件；第③步，保存。"),
    ("ＡＢＣ１２３，全角", "ABC123，全角"),
    ("温度25℃～30℃。", "温度25℃~30℃。"),
    ("《红楼梦》的作者是曹雪芹、高鹗", "《红楼梦》作者：曹雪芹"),
    ("第一行\n第二行。", "第一行 第二行。"),
    ("a - b，甲-乙", "a-b，甲 - 乙"),
    ("好 ✓ 坏 ✗ ☆☆", "好✓ 坏✗ ☆"),
    ("OK！", "OK。"),
    # The words of both are zh's where one of them alone is Chinese.
    ("“Python” and “Java” or “C”", "“Python” 和 “Java” 或 “C”"),
    ("Yes、no（maybe）", "Yes、no（never）"),
    ("ㄅㄆㄇ㈱㍿", "ㄅㄆㄈ㈱㍿"),
]


def test_bleu_of_chinese_is_that_of_sacrebleus_zh() -> None:
    """Pairs by hand, and pairs of anything that stands in Chinese text, each against the package."""
    metric = BLEU(tokenize="zh")
    assert scored("bleu", CHINESE[0]) == pytest.approx(75.98, abs=0.005)
    parts = [
        *"我喜欢你他的书。，！？：；「」『』《》（）【】、…—“”‘’·～％１Ａ",
        " ",
        "\n",
        " Python",
        "3.5",
        "1,000",
        " the cat",
        "don't",
        "-",
        "%",
        ".",
        "?",
    ]
    rng = random.Random(0)
    drawn = [tuple("我" + "".join(rng.choices(parts, k=rng.randint(4, 25))) for _ in range(2)) for _ in range(300)]
    for pair in [*CHINESE, *drawn]:
        expected = metric.corpus_score([pair[0]], [[pair[1]]]).score
        assert as_sacrebleu(scored("bleu", pair)) == pytest.approx(expected, abs=1e-9), pair
    answers, references = zip(*CHINESE, *drawn, strict=True)
    assert scored("bleu", *CHINESE, *drawn) == pytest.approx(metric.corpus_score(list(answers), [list(references)]).score, abs=1e-9)


def test_bleu_of_texts_with_spaces_between_words_is_that_of_sacrebleus_13a() -> None:
    metric = BLEU()
    parts = [
        "the",
        "cat",
        "“quoted”",
        "‘so’",
        "it’s",
        "a—b",
        "wait…",
        "don't",
        "e.g.",
        "1,000.5",
        "$5",
        "€5",
        "well-known",
        "-\n",
        "\n",
        "&amp;",
        "x?",
        "(y)",
    ]
    parts += ["naïve", "да", "нет!", "한국어", "ㅋㅋ", "كتاب؟", "किताब।", "✓ok", "→", "👍🏽"]
    rng = random.Random(0)
    pairs = [tuple(" ".join(rng.choices(parts, k=rng.randint(4, 25))) for _ in range(2)) for _ in range(300)]
    for pair in pairs:
        assert as_sacrebleu(scored("bleu", pair)) == pytest.approx(metric.corpus_score([pair[0]], [[pair[1]]]).score, abs=1e-9), pair


def test_bleu_parts_the_characters_of_every_script_without_spaces() -> None:
    """One of the eight characters differs: n-grams 7 of 8, 5 of 7, 4 of 6, 3 of 5, for kana and Thai as for Chinese."""
    expected = 100 * (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** (1 / 4)
    for answer, reference in (("あいうえおかきく", "あいうえおかけく"), ("กขคงจฉชซ", "กขคงจฉดซ"), ("天地玄黄宇宙洪荒", "天地玄黄宇宙広荒")):
        assert scored("bleu", (answer, reference)) == pytest.approx(expected), answer


def test_values_are_of_each_row_of_sums() -> None:
    """As the bootstrap asks for them: thousands of sums at once."""
    rng = random.Random(1)
    for name, score in SCORES.items():
        rows = np.array([score.statistics(*(" ".join(rng.choices("abcdef", k=rng.randint(0, 9))) for _ in range(2))) for _ in range(20)])
        assert score.value(rows) == pytest.approx([float(score.value(row)) for row in rows], nan_ok=True), name


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


@pytest.mark.parametrize(("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_that_of_rouge_score_to_the_last_digit(name: str, kind: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer([kind], tokenizer=Words())
    rng = random.Random(0)
    for _ in range(500):
        answer, reference = (" ".join(rng.choices(["a", "b", "c", "Éa", "да", "東京", "don't", "!"], k=rng.randint(0, 30))) for _ in range(2))
        if words(answer) or words(reference):
            assert SCORES[name].statistics(answer, reference) == [scorer.score(reference, answer)[kind].fmeasure, 1.0], (answer, reference)


def test_scoring_imports_no_model_library_and_nothing_slow() -> None:
    """rouge_score alone would import nltk, scikit-learn and scipy: seconds of a stage that takes one."""
    program = """
import sys
import stages.evaluate
from qlora.scoring.metrics import SCORES
for score in SCORES.values():
    score.statistics("a 東 b c d", "a 京 b c d")
print(*sorted({"torch", "transformers", "datasets", "rouge_score", "nltk", "sklearn", "scipy", "pandas"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
