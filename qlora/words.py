"""Words of any script."""

import re

_ALONE = r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
"""A character of a script that is written without spaces: Thai to Tibetan, Myanmar, Khmer, kana, Chinese characters."""

ALONE = re.compile(_ALONE)
WORDS = re.compile(rf"{_ALONE}|(?:(?!{_ALONE})[^\W_])+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; in scripts without spaces between words each character is one.

    >>> words("Don't go to 東京!")
    ['don', 't', 'go', 'to', '東', '京']
    """
    return WORDS.findall(text.lower())
