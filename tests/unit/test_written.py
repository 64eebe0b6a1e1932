"""What a tool may replace, where the note that says so is damaged."""

import json
from pathlib import Path

import pytest

from qlora.core.errors import InputError
from qlora.delivery.ownership import MEMORY, require_replaceable, require_replaceable_folder
from tools import card


@pytest.mark.parametrize("note", [True, None, [], "x", {"sha256": 5}])
def test_a_damaged_note_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: object) -> None:
    monkeypatch.chdir(tmp_path)
    MEMORY.parent.mkdir(parents=True)
    MEMORY.write_text(json.dumps({"a.json": note}), encoding="utf-8")
    Path("a.json").write_text("somebody's", encoding="utf-8")
    with pytest.raises(InputError, match="occupied"):
        require_replaceable(Path("a.json"), own=False)


@pytest.mark.parametrize("listed", [None, [], "x", {"a": 5}, {"a": {}}])
def test_a_damaged_record_of_a_folder_is_none(tmp_path: Path, listed: object) -> None:
    (tmp_path / "a").write_text("somebody's", encoding="utf-8")
    with pytest.raises(InputError, match="occupied"):
        require_replaceable_folder(tmp_path, listed)


def test_a_card_of_damaged_notes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a character in a note, which json reads and no file takes."""
    monkeypatch.setattr("sys.argv", ["card"])
    monkeypatch.setattr(card, "CARD", tmp_path / "card.md")
    monkeypatch.setattr(card, "FROZEN_ENVIRONMENT", tmp_path / "environment.json")
    monkeypatch.setattr(card, "read_environment", dict)
    monkeypatch.setattr(card, "read_sources", dict)
    monkeypatch.setattr(card, "render", lambda _: "\ud800")
    with pytest.raises(InputError, match="card-damaged"):
        card.main()
    assert list(tmp_path.iterdir()) == []
