"""Text of any script: its words, its normal form, and how a terminal, a page or a shell may be given it."""

import os
import shlex
import unicodedata

import regex

_ALONE = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that are written without spaces: Thai to Tibetan, Myanmar, Khmer, kana, Chinese characters."""

ALONE = regex.compile(f"[{_ALONE}]")
# Marks continue a word: in Hindi and vowelled Arabic they are its vowels.
WORDS = regex.compile(rf"(?V1)[{_ALONE}]|[[\p{{L}}\p{{N}}]--[{_ALONE}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_ALONE}]]*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; in scripts without spaces between words, each character is one word.

    >>> words("Don't go to 東京!")
    ['don', 't', 'go', 'to', '東', '京']
    """
    found: list[str] = WORDS.findall(text.lower())
    return found


def nfc(text: str) -> str:
    """The text in Unicode normal form C, in which one character has one spelling.

    >>> nfc("e\\u0301") == "é"
    True
    """
    return unicodedata.normalize("NFC", text)


def visible(text: str) -> str:
    """The text with everything that would control a terminal spelled out: escape sequences, direction marks, lone surrogates."""
    return "".join(character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}" for character in text)


# Of underscores those alone stay that stand between letters or digits.
_MARKUP = regex.compile(r"[\\`*\[\]<>&|~#!]|(?<![^\W_])_|_(?![^\W_])")


def in_markdown(text: str) -> str:
    """The text as one line of Markdown that shows it and marks up nothing: no heading, link, image, cell or HTML of its own.

    >>> in_markdown("a_b <b>\\n# c")
    'a_b &#60;b&#62; &#35; c'
    """
    shown: str = _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(visible(text).split()))
    return shown


def in_shell(text: str | os.PathLike[str]) -> str:
    """The text as one word, and one line, of a command for bash.

    >>> in_shell("a b"), in_shell("a\\nb")
    ("'a b'", "$'a\\\\x0ab'")
    """
    name = os.fspath(text)
    if name.isprintable():
        return shlex.quote(name)
    shown = (one if one.isprintable() and one not in "\\'" else "".join(f"\\x{byte:02x}" for byte in os.fsencode(one)) for one in name)
    return f"$'{''.join(shown)}'"
