"""Which half-written files no process writes any more."""

import os
from pathlib import Path

import pytest

from qlora.core import files
from qlora.core.files import is_abandoned


@pytest.mark.parametrize(
    ("name", "abandoned"),
    [
        ("merged.4194305.partial", True),
        ("train.json.4194305.partial", True),
        ("merged.{}.partial", False),
        # Not as our writers call them.
        ("merged.mine.partial", False),
        ("4194305.partial", False),
        ("partial", False),
    ],
)
def test_a_half_written_file_belongs_to_the_process_in_its_name(name: str, abandoned: bool) -> None:
    assert is_abandoned(Path("models") / name.format(os.getpid())) == abandoned


def test_nothing_is_abandoned_where_processes_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROC", tmp_path / "proc")
    assert not is_abandoned(Path("models/merged.4194305.partial"))
