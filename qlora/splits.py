"""Which split a conversation belongs to: decided by its content alone, never by its place or its neighbours."""

import hashlib

SPLITS = ("train", "validation", "test")


def content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def split_of(digest: str, *, validation: float, test: float) -> str:
    """The split of a row of the train file.

    The digest is read as a number in [0, 1): test takes the lowest share, validation the next, train the rest. So a row
    never moves because others come or go, and a larger validation share only takes rows from train.

    Args:
        digest: Hex digest, at least 13 digits.
        validation: Share of validation.
        test: Share of test.
    """
    place = int(digest[:13], 16) / 16**13
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
