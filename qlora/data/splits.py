"""Which split a conversation belongs to: decided by its prompt alone, never by its place or its neighbours."""

from qlora.data.duplicates import KEY_BITS

SPLITS = ("train", "validation", "test")


def split_of(prompt: int, *, validation: float, test: float) -> str:
    """The split of a row of the train file.

    The key of its prompt is read as a number in [0, 1): test takes the lowest share, validation the next, train the rest.
    So conversations that answer one prompt are never parted, a row never moves because others come or go, and a larger
    validation share only takes rows from train.

    Args:
        prompt: Key of KEY_BITS bits.
        validation: Share of validation.
        test: Share of test.
    """
    place = prompt / 2**KEY_BITS
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
