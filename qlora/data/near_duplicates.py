"""Conversations that are nearly the same: candidates by MinHash and locality-sensitive hashing, confirmed by their own word pairs.

Method: A. Broder, On the resemblance and containment of documents, 1997; J. Leskovec, A. Rajaraman, J. Ullman, Mining of Massive
Datasets, chapter 3.

Own code because datasketch's index keeps Python objects for every band of every row and datatrove's passes its signatures through folders, where
this takes 200 bytes a row in one pass with the rest of prepare, and because each candidate is confirmed by its real word pairs. rensa makes the
signatures. It goes once a library gives the same pairs in a stream, in bounded memory, in the same order on any number of processes.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import rensa

from qlora.core.conversation import Message
from qlora.core.text import WORDS
from qlora.data.duplicates import normalised, whole_text

MIN_WORDS = 20
"""Shorter conversations are not compared: a question about another number would be nearly the same."""
PERMUTATIONS = 128
SEED = 1
BUCKET = 4
"""Earlier rows of one bucket that a row is compared with, so that a million rows made from one form take no million comparisons each."""

_LETTERS = bytes(code if chr(code).isalnum() else 32 for code in range(128)) + bytes(range(128, 256))

Bands = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def word_pairs(texts: Sequence[bytes]) -> list[bytes]:
    """Each word and the next, of normalised texts in their order; none when there are less than MIN_WORDS words.

    >>> word_pairs([b"what is it? " * 7])[:4]
    [b'what is', b'is it', b'it what', b'what is']
    """
    words = _words(b" ".join(texts))
    return list(map(b" ".join, pairwise(words))) if len(words) >= MIN_WORDS else []


def _words(text: bytes) -> list[bytes]:
    words = text.translate(_LETTERS).split()
    if text.isascii():
        return words
    # Only what is not plain is looked at letter by letter: that takes ten times as long.
    for place in [place for place, plain in enumerate(map(bytes.isascii, words)) if not plain][::-1]:
        words[place : place + 1] = [word.encode() for word in WORDS.findall(words[place].decode("utf-8", "surrogatepass"))]
    return words


def spoken(messages: Sequence[Message]) -> list[bytes]:
    """What a conversation is compared by: its texts, normalised, but the system turn's, which many share."""
    return [normalised(whole_text(message)) for message in messages if message["role"] != "system"]


def rows_per_band(threshold: float) -> int:
    """The most hashes per band with which two conversations of this Jaccard similarity share a band in 995 cases of 1,000."""
    fitting = [rows for rows in range(1, 17) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.995]
    return max(fitting, default=1)


def signature(pairs: Sequence[bytes]) -> list[int]:
    """PERMUTATIONS numbers: the share that two conversations have in common estimates their Jaccard similarity."""
    # One by one: rensa's functions for many rows start threads, which a forked process waits for in vain.
    sketch = rensa.RMinHash(PERMUTATIONS, SEED)
    sketch.update(pairs)
    found: list[int] = sketch.digest()
    return found


def bands_of(conversations: Sequence[Sequence[bytes]], threshold: float) -> list[bytes]:
    """For each conversation's word pairs the keys of its bands, 8 bytes each, of `rows_per_band(threshold)` hashes; nothing for no pairs."""
    signatures = [signature(pairs) for pairs in conversations if pairs]
    keys = iter(_bands(signatures, threshold)) if signatures else iter(())
    return [next(keys).tobytes() if pairs else b"" for pairs in conversations]


def _bands(signatures: Sequence[Sequence[int]], threshold: float) -> Bands:
    width = rows_per_band(threshold)
    count = PERMUTATIONS // width
    hashes = np.array(signatures, dtype=np.uint64).reshape(len(signatures), -1)[:, : width * count].reshape(-1, count, width)
    keys = np.zeros((len(signatures), count), dtype=np.uint64)
    for place in range(width):
        # Multiplied and folded, so that every hash moves every bit: the finalizer of SplitMix64, shortened.
        keys = (keys ^ hashes[:, :, place]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


class Pair(NamedTuple):
    """Two rows, as the places where they stand in the raw files, and the Jaccard similarity of their word pairs."""

    row: str
    other: str
    similarity: float

    def __str__(self) -> str:
        return f"  {self.row} ~ {self.other} ({self.similarity:.2f})"


class NearDuplicates:
    """Rows of all splits that are long enough to compare; about 200 bytes each at a threshold of 0.8, and for a moment up to 1,000 where
    most are made from one form and share bands."""

    def __init__(self, threshold: float) -> None:
        self.too_short = 0
        self._threshold = threshold
        self._bands = bytearray()
        self._rows = array("Q")
        self._offsets = array("Q")
        self._sources = array("L")
        self._places: list[tuple[str, Path]] = []
        self._written: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, split: str, path: Path, rows: Sequence[int], ends: Sequence[int], bands: Sequence[bytes], *, more: int = 0) -> None:
        """Remember lines that are about to be written to the split's file.

        Args:
            rows: Their numbers in the raw file.
            ends: Where each ends, from the first on.
            bands: Their keys, or nothing where a conversation is too short.
            more: Bytes that are written after them.
        """
        if not self._places or self._places[-1] != (split, path):
            self._places.append((split, path))
        source = len(self._places) - 1
        written = self._written.get(split, 0)
        for start, row, keys in zip((0, *ends[:-1])[: len(ends)], rows, bands, strict=True):
            if not keys:
                self.too_short += 1
                continue
            self._bands += keys
            self._rows.append(row)
            self._offsets.append(written + start)
            self._sources.append(source)
        self._written[split] = written + (ends[-1] if ends else 0) + more

    def find(self, files: Mapping[str, BinaryIO]) -> tuple[list[Pair], list[Pair]]:
        """Rows that are nearly an earlier one of the train file, and test rows that are nearly one of it.

        Args:
            files: What was written, by split.
        """
        if not self._rows:
            return [], []
        sources = np.frombuffer(self._sources, dtype=np.dtype("L"))
        numbers_of = {path: number for number, path in enumerate(dict.fromkeys(path for _, path in self._places))}
        numbers = np.array([numbers_of[path] for _, path in self._places])[sources]
        # In the order of the raw files; they came a batch at a time, split by split.
        order = np.lexsort((np.frombuffer(self._rows, dtype=np.uint64), numbers))
        keys = np.frombuffer(self._bands, dtype=np.uint64).reshape(len(order), -1)
        held_out = np.array([split == "test" for split, _ in self._places])[sources[order]]
        trained, tests = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        with ExitStack() as opened:
            for file in files.values():
                file.flush()
            readers = {split: opened.enter_context(Path(file.name).open("rb")) for split, file in files.items()}

            @lru_cache(maxsize=256)
            def pairs_of(index: int) -> frozenset[bytes]:
                reader = readers[self._places[self._sources[index]][0]]
                reader.seek(self._offsets[index])
                return frozenset(word_pairs(spoken(orjson.loads(reader.readline())["messages"])))

            def confirmed(candidates: Iterator[tuple[int, int]]) -> list[Pair]:
                """The first confirmed candidate of each row."""
                found: dict[int, Pair] = {}
                for place, other_place in candidates:
                    index, other = int(order[place]), int(order[other_place])
                    if index not in found:
                        similarity = jaccard(pairs_of(index), pairs_of(other))
                        if similarity >= self._threshold:
                            found[index] = Pair(self._place(index), self._place(other), similarity)
                return list(found.values())

            return confirmed(_same_band(keys, order, trained, trained)), confirmed(_same_band(keys, order, tests, trained))

    def _place(self, index: int) -> str:
        return f"{self._places[self._sources[index]][1]}: row {self._rows[index]}"


def jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _same_band(keys: Bands, order: Places, asked: Places, among: Places) -> Iterator[tuple[int, int]]:
    """(place asked about, place among those), in order, that share the key of a band; of one key the first BUCKET places are looked at.

    Where both are of the train file, the second is the earlier one.

    Args:
        keys: (rows, bands)
        order: The row at each place.
        asked, among: Places, ascending.
    """
    found = [np.empty((0,), dtype=np.int64)]
    for number in range(keys.shape[1]):
        band = keys[order, number]
        sorted_places = among[np.argsort(band[among], kind="stable")]
        sorted_keys = band[sorted_places]
        first = np.searchsorted(sorted_keys, band[asked])
        for step in range(BUCKET):
            inside = np.flatnonzero(first + step < len(sorted_keys))
            others = first[inside] + step
            same = sorted_keys[others] == band[asked[inside]]
            if asked is among:
                same &= sorted_places[others] < asked[inside]
            found.append(asked[inside[same]] * len(order) + sorted_places[others[same]])
    for pair in np.unique(np.concatenate(found)).tolist():
        yield divmod(pair, len(order))
