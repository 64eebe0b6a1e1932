"""Which texts are the same: keys of normalised text, and the rows that share one."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from qlora.core.conversation import CALL, PLAIN_KEYS, Message

KEY_BITS = 60
"""Python holds a number of 60 bits in 32 bytes. Among ten million texts two different ones share a key with probability 4e-5."""
GROW_SLOTS = 1 << 16
"""Looked at together when the table of keys grows, so that it needs little memory besides."""

Keys = npt.NDArray[np.uint64]
MOST_FILES = 1 << 24
_PLAIN = bytes(32 if chr(code).isspace() else ord(chr(code).lower()) for code in range(128)) + bytes(range(128, 256))
_OTHER_SPACES = [space.encode() for space in ("\u0085", "\u1680", "\u2028", "\u2029")]
"""White space beyond ASCII that NFKC leaves as it is."""


def normalised(text: str) -> bytes:
    """The text in UTF-8 without differences of case, width (NFKC) and white space.

    >>> normalised("Ｗｈａｔ  is\\n“STRASSE”?") == normalised("what is “straße”?")
    True
    """
    if text.isascii():
        plain = text.encode().translate(_PLAIN)
    else:
        # Folding case can undo the normal form: https://www.unicode.org/reports/tr15/#NFKC_Casefold
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        plain = folded.encode("utf-8", "surrogatepass").translate(_PLAIN)
        for space in _OTHER_SPACES:
            plain = plain.replace(space, b" ")
    while b"  " in plain:
        plain = plain.replace(b"  ", b" ")
    return plain.strip(b" ")


def whole_text(message: Message) -> str:
    """What distinguishes a message from others: its text, reasoning and calls."""
    if len(message) == PLAIN_KEYS:
        return message["content"]
    calls = orjson.dumps(message["tool_calls"], option=orjson.OPT_SORT_KEYS).decode() if "tool_calls" in message else ""
    return "\n".join(part for part in (message.get("reasoning_content", ""), message["content"], calls) if part)


def keys_of(roles: tuple[str, ...], texts: Sequence[bytes]) -> tuple[int, int]:
    """Keys of the whole conversation and of its prompt; the same for texts that differ by case, width and white space.

    The prompt is what the last answer answers: every turn before it but the system's, which many conversations share.

    Args:
        texts: `whole_text` of the messages, normalised, and what else distinguishes the conversation.
    """
    named, asked = _order(roles)
    return _key([named, *texts]), _key([texts[place] for place in asked])


@lru_cache
def _order(roles: tuple[str, ...]) -> tuple[bytes, tuple[int, ...]]:
    """The roles in one text, and the places of the prompt's turns. A dataset holds few orders."""
    asked = roles[:-1] if roles and roles[-1] in ("assistant", CALL) else roles
    return " ".join(roles).encode("utf-8", "surrogatepass"), tuple(place for place, role in enumerate(asked) if role != "system")


def _key(texts: Sequence[bytes]) -> int:
    return xxhash.xxh3_64_intdigest(b"\x00".join(texts)) >> (64 - KEY_BITS)


class SeenKeys:
    """Keys in the order in which they come; tells which came before. 16 to 32 bytes a key, and half as much again while it grows.

    A hash table with linear probing, at most half full, that looks at all keys of a call at once.
    """

    def __init__(self) -> None:
        self._slots = np.zeros(1 << 13, dtype=np.uint64)
        """A key's first place is its lowest bits; 0 stands for none, so a key is stored plus 1."""
        self._count = 0

    def repeated(self, keys: Sequence[int]) -> list[int]:
        """Positions of the keys that were seen before, here or in an earlier call."""
        unique, first = np.unique(np.array(keys, dtype=np.uint64), return_index=True)
        while 2 * (self._count + len(unique)) > len(self._slots):
            self._grow()
        new = first[self._add(unique + np.uint64(1))]
        self._count += len(new)
        is_repeated = np.ones(len(keys), dtype=bool)
        is_repeated[new] = False
        return np.flatnonzero(is_repeated).tolist()

    def _add(self, stored: Keys) -> npt.NDArray[np.bool_]:
        """Which of these, none of them twice, were not there; they are now."""
        last = np.uint64(len(self._slots) - 1)
        new = np.zeros(len(stored), dtype=bool)
        left = np.arange(len(stored))
        places = (stored - np.uint64(1)) & last
        while len(left):
            wanted = stored[left]
            free = self._slots[places] == 0
            # Of several that want one place the last stays there; the others go on to the next place, like those that found it taken.
            self._slots[places[free]] = wanted[free]
            placed = self._slots[places] == wanted
            new[left[placed & free]] = True
            left, places = left[~placed], (places[~placed] + np.uint64(1)) & last
        return new

    def _grow(self) -> None:
        old = self._slots
        self._slots = np.zeros(2 * len(old), dtype=np.uint64)
        for start in range(0, len(old), GROW_SLOTS):
            some = old[start : start + GROW_SLOTS]
            self._add(some[some > 0])


class Leakage:
    """Prompts of the test split that the train file holds too."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        """First test row of each prompt."""
        self._more: dict[int, list[int]] = {}
        """Its other test rows."""
        self._found: dict[int, int] = {}
        """First train row of each prompt that leaked."""
        self._paths: list[Path] = []

    def add_test(self, prompts: Sequence[int], rows: Sequence[int], path: Path) -> None:
        for prompt, row in zip(prompts, rows, strict=True):
            place = self._place(row, path)
            if prompt in self._rows:
                self._more.setdefault(prompt, []).append(place)
            else:
                self._rows[prompt] = place

    def leaked(self, prompts: Sequence[int]) -> list[int]:
        """Positions of the prompts that the test split holds."""
        if self._rows.keys().isdisjoint(prompts):
            return []
        return [position for position, prompt in enumerate(prompts) if prompt in self._rows]

    def add_leak(self, prompt: int, row: int, path: Path) -> None:
        """Remember where the train file holds a prompt of the test split."""
        self._found.setdefault(prompt, self._place(row, path))

    @property
    def leaked_test_rows(self) -> int:
        return sum(1 + len(self._more.get(prompt, ())) for prompt in self._found)

    def listed(self, limit: int = 10) -> str:
        """One line for each of the first prompts: its rows in the test file and its first row in the train file."""
        lines = [
            f"  {', '.join(map(self._label, (self._rows[prompt], *self._more.get(prompt, ()))))} = {self._label(place)}"
            for prompt, place in list(self._found.items())[:limit]
        ]
        more = [f"  and {len(self._found) - limit} more"] if len(self._found) > limit else []
        return "\n".join(lines + more)

    def _place(self, row: int, path: Path) -> int:
        """Row and file as one small number."""
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
        return row * MOST_FILES + len(self._paths) - 1

    def _label(self, place: int) -> str:
        row, file = divmod(place, MOST_FILES)
        return f"{self._paths[file]}: row {row}"
