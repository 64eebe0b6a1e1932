"""Clones that tests share."""

import shutil
from pathlib import Path

import pytest

from tests.pipeline.clone import Clone, new_clone, tiny_rows


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the micro pipeline ran and was committed."""
    raw = {"data/raw/micro/train.jsonl": tiny_rows("train", 60), "data/raw/micro/test.jsonl": tiny_rows("test", 8)}
    clone = new_clone(tmp_path_factory.mktemp("built"), Path(__file__).with_name("micro.yaml"), raw)
    assert clone.repro() == {"prepare", "baseline", "train", "evaluate"}
    clone.commit("built")
    return clone


@pytest.fixture
def built(_built: Clone, tmp_path: Path) -> Clone:
    """A copy of the built clone, free to be changed."""
    shutil.copytree(_built.path, tmp_path / "clone", symlinks=True)
    return Clone(tmp_path / "clone")


@pytest.fixture
def inside(built: Clone, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """The built clone, in which the test itself works, without a network."""
    monkeypatch.chdir(built.path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return built
