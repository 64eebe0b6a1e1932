"""Clones that tests share."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipeline.clone import Clone, new_clone, tiny_rows


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that ends."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the micro pipeline ran and was committed; made once for all processes of a test run, and changed by none."""
    base = tmp_path_factory.getbasetemp()
    # Each process of xdist has a folder of its own in that of the run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    clone, unfinished = Clone(shared / "built"), shared / "built-unfinished"
    with _alone(shared / "built.lock"):
        if not clone.path.exists():
            # Another process's attempt that failed.
            shutil.rmtree(unfinished, ignore_errors=True)
            _build(unfinished)
            unfinished.rename(clone.path)
    return clone


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
