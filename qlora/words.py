"""Words of any script."""

import regex

_ALONE = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that are written without spaces: Thai to Tibetan, Myanmar, Khmer, kana, Chinese characters."""

ALONE = regex.compile(f"[{_ALONE}]")
# Marks continue a word: in Hindi and vowelled Arabic they are its vowels.
WORDS = regex.compile(rf"(?V1)[{_ALONE}]|[[\p{{L}}\p{{N}}]--[{_ALONE}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_ALONE}]]*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; in scripts without spaces between words each character is one.

    >>> words("Don't go to 東京!")
    ['don', 't', 'go', 'to', '東', '京']
    """
    found: list[str] = WORDS.findall(text.lower())
    return found
