"""Progress without a terminal: lines with what is done and the time left."""

import sys

import pytest

from qlora.runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_a_line_now_and_then_says_what_is_done_and_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("answers", total=12, initial=2, unit="batches", enabled=True) as bar:
        for clock[0] in (10, 20, 40, 50, 100):
            bar.update(2)
    # After 40 s 6 of the 10 that were left are made, and after 100 s all.
    assert capsys.readouterr().out == "answers: 8 of 12 batches, 27 s left\n"


def test_without_a_total_no_time_is_estimated(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("train", unit="rows", enabled=True) as bar:
        clock[0] = 31
        bar.update(4000)
    assert capsys.readouterr().out == "train: 4,000 rows\n"


def test_progress_that_is_switched_off_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("answers", total=2, unit="batches", enabled=False) as bar:
        clock[0] = 31
        bar.update(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (3601, "1 h 1 min"), (7200, "2 h 0 min")])
def test_a_duration_is_said_in_one_or_two_units(seconds: float, said: str) -> None:
    assert progress._duration(seconds) == said
