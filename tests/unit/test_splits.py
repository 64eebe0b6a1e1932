from qlora.data.duplicates import KEY_BITS, keys_of, normalised
from qlora.data.splits import split_of

KEYS = [keys_of(("user", "assistant"), [normalised(str(number)), b"x"])[1] for number in range(4000)]


def share(name: str, validation: float, test: float) -> set[int]:
    return {key for key in KEYS if split_of(key, validation=validation, test=test) == name}


def test_every_row_is_in_one_split_of_about_the_asked_size() -> None:
    sizes = {name: len(share(name, 0.1, 0.2)) for name in ("train", "validation", "test")}
    assert sum(sizes.values()) == 4000
    assert abs(sizes["validation"] - 400) < 60
    assert abs(sizes["test"] - 800) < 80


def test_a_larger_validation_share_only_takes_rows_from_train() -> None:
    assert share("validation", 0.1, 0.2) < share("validation", 0.2, 0.2)
    assert share("test", 0.1, 0.2) == share("test", 0.2, 0.2)


def test_no_share_means_no_rows() -> None:
    assert share("train", 0.0, 0.0) == set(KEYS)


def test_the_border_belongs_to_the_next_split() -> None:
    half = 2 ** (KEY_BITS - 1)
    assert split_of(half, validation=0.25, test=0.5) == "validation"
    assert split_of(half, validation=0.0, test=0.5) == "train"
