"""What an interrupted run of answers finished is read again whole, or not at all."""

from pathlib import Path

import pytest

from qlora.prediction import journal as module
from qlora.prediction.generation import Answer
from qlora.prediction.journal import Journal
from qlora.runtime.locks import try_lock

NLLS = [(0.1 + 0.2, 1e-300), (float("inf"), 3.0)]
ANSWERS = {4: Answer("é\n\u2028", stopped=True, tokens=3), 2: Answer("", stopped=False, tokens=0)}


def kept(folder: Path) -> Journal:
    """Two entries of a run that was killed."""
    with Journal(folder) as journal:
        journal.add_nlls(7, NLLS)
        journal.add_answers(5, ANSWERS)
    return journal


def test_what_was_finished_is_read_to_the_last_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = kept(tmp_path / "run")
    with Journal(tmp_path / "run") as again:
        assert again.nlls == before.nlls == {7: NLLS}
        assert again.answers == before.answers == {(5, 4): ANSWERS[4], (5, 2): ANSWERS[2]}
        assert again.reused_answers == 2
        assert "resuming: 1 likelihood(s) and 2 answer(s) of an interrupted run are reused" in capsys.readouterr().out
        again.add_nlls(8, NLLS)
        again.remove()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "without its end", "changed", "more"])
def test_a_damaged_line_is_made_again_and_the_others_stay(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept(tmp_path / "run")
    path = tmp_path / "run/0.jsonl"
    first, last = path.read_bytes().splitlines(keepends=True)
    last = {"cut": last[:40], "without its end": last[:-1], "changed": last.replace(b"true", b"null"), "more": b"\xff\x00\n"}[damage]
    path.write_bytes(first + last)
    with Journal(tmp_path / "run") as again:
        assert (again.nlls, again.answers) == ({7: NLLS}, {})
        assert "0.jsonl holds damaged lines, whose work is done again: 1 of 2" in capsys.readouterr().err
        again.add_answers(5, ANSWERS)
    # What is added after a damaged line is not lost with it.
    with Journal(tmp_path / "run") as whole:
        assert len(whole.nlls) == 1
        assert len(whole.answers) == 2
    assert "damaged" not in capsys.readouterr().err


def test_a_second_process_keeps_nothing_and_leaves_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two experiments of a queue may need one baseline: none of them fails."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0)
    kept(tmp_path / "run")
    lock = try_lock(tmp_path / "run/lock")
    assert lock
    before = (tmp_path / "run/0.jsonl").read_bytes()
    with Journal(tmp_path / "run") as second:
        assert not second.nlls
        second.add_nlls(1, NLLS)
        second.remove()
    assert (tmp_path / "run/0.jsonl").read_bytes() == before
    assert "another process answers the same" in capsys.readouterr().err
    lock.close()


def test_a_journal_that_can_not_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with Journal(tmp_path / "run") as journal:
        (tmp_path / "run/0.jsonl").unlink()
        assert journal._file
        journal._file.close()
        journal._file = full.open("ab", buffering=0)
        journal.add_nlls(1, NLLS)
        journal.add_nlls(2, NLLS)
        assert journal.nlls == {1: NLLS, 2: NLLS}
    assert capsys.readouterr().err.count("can't be written") == 1


def test_a_run_that_finished_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with Journal(tmp_path / "run"):
        assert (tmp_path / "run/lock").exists()
    assert not (tmp_path / "run").exists()
