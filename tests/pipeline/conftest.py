"""Clones that tests share."""

import shutil
from pathlib import Path

import pytest

from tests.helpers import once
from tests.pipeline.clone import Clone, new_clone, tiny_rows


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the micro pipeline ran and was committed; changed by no test."""
    return Clone(once(tmp_path_factory, "built", _build))


def _build(path: Path) -> None:
    raw = {"data/raw/micro/train.jsonl": tiny_rows("train", 60), "data/raw/micro/test.jsonl": tiny_rows("test", 8)}
    clone = new_clone(path, Path(__file__).with_name("micro.yaml"), raw)
    assert clone.repro() == {"prepare", "baseline", "train", "predict", "evaluate"}
    clone.commit("built")


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
