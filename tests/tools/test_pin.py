import json
import shutil
from pathlib import Path

import pytest

from qlora.core.errors import InputError
from tools import pin

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, and the weights elsewhere."""
    (tmp_path / "root" / "models" / "base").mkdir(parents=True)
    shutil.copytree(TINY, tmp_path / "weights")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["pin", *arguments])
    pin.main()


def test_pinning_a_folder_writes_its_manifest_and_links_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "mine", "--path", "../weights")
    record = json.loads((root / "models/base/mine.json").read_text(encoding="utf-8"))
    assert set(record) == {"files"}
    assert "make.py" not in record["files"]
    assert record["files"]["model.safetensors"]["bytes"] == (TINY / "model.safetensors").stat().st_size
    assert (root / "models/base/mine").readlink() == root.parent / "weights"


def test_pinning_again_moves_the_link(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "mine", "--path", "../weights")
    shutil.copytree(root.parent / "weights", root.parent / "other")
    call(monkeypatch, "mine", "--path", "../other")
    assert (root / "models/base/mine").readlink() == root.parent / "other"


def test_pinning_a_link_by_its_own_path_keeps_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "mine", "--path", "../weights")
    call(monkeypatch, "mine", "--path", "models/base/mine")
    assert (root / "models/base/mine").resolve() == root.parent / "weights"


def test_a_folder_in_its_place_is_pinned_where_it_is_and_never_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY, root / "models/base/mine")
    call(monkeypatch, "mine", "--path", "models/base/mine")
    assert not (root / "models/base/mine").is_symlink()
    with pytest.raises(InputError, match="pin-occupied"):
        call(monkeypatch, "mine", "--path", "../weights")


@pytest.mark.parametrize("revision", ["../main", "a b", "?x", ""])
def test_what_can_be_no_revision_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    with pytest.raises(InputError, match="pin-revision"):
        call(monkeypatch, "mine", "--repo-id", "org/name", "--revision", revision)
    assert list((root / "models/base").iterdir()) == []


@pytest.mark.parametrize("name", ["../mine", ".mine", "a/b", ""])
def test_a_name_that_is_no_name_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(InputError, match="pin-name"):
        call(monkeypatch, name, "--path", "../weights")


def test_a_missing_folder_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="absent is not a folder"):
        call(monkeypatch, "mine", "--path", "../absent")
    assert list((root / "models/base").iterdir()) == []
