"""Clones that tests share."""

import shutil
from pathlib import Path

import pytest

from benchmarks.torture import unrun
from tests.helpers import once
from tests.pipeline.clone import TRIED, Clone, new_clone, ran, tiny_rows


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


@pytest.fixture(scope="session")
def _tried(_built: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The built clone after an experiment, which README.md has word for word but for its name; changed by no test."""

    def experiment(path: Path) -> None:
        shutil.copytree(_built.path, path, symlinks=True)
        output = Clone(path).run("dvc", "exp", "run", "--name", "slower", *TRIED.removeprefix("dvc exp run ").split())
        assert ran(output) == {"train", "predict", "evaluate"}

    return Clone(once(tmp_path_factory, "tried", experiment))


@pytest.fixture
def tried(_tried: Clone, tmp_path: Path) -> Clone:
    """A copy of the clone with an experiment, free to be changed."""
    shutil.copytree(_tried.path, tmp_path / "tried", symlinks=True)
    return Clone(tmp_path / "tried")


@pytest.fixture
def inside(built: Clone, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """The built clone, in which the test itself works, without a network."""
    monkeypatch.chdir(built.path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return built


@pytest.fixture(scope="session")
def before_training(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone of benchmarks/torture.py in which what comes before the training ran; changed by no test."""

    def make(path: Path) -> None:
        clone = unrun(path)
        clone.repro("baseline")
        clone.commit("before training")

    return Clone(once(tmp_path_factory, "before-training", make))


@pytest.fixture(scope="session")
def whole_training(before_training: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Such a clone after a training that nothing stopped; changed by no test."""

    def train(path: Path) -> None:
        shutil.copytree(before_training.path, path, symlinks=True)
        assert Clone(path).repro("train") == {"train"}

    return Clone(once(tmp_path_factory, "whole", train))


@pytest.fixture(scope="session")
def of_two_processes(before_training: Clone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, dict[str, bytes]]:
    """A clone in which a training by two processes is about to begin, and what it makes when nothing stops it."""

    def make(folder: Path) -> None:
        shutil.copytree(before_training.path, folder / "clone", symlinks=True)
        clone = Clone(folder / "clone")
        clone.set(hardware__num_processes=2, hardware__per_device_train_batch_size=1)
        clone.repro("baseline")
        clone.commit("two processes")
        shutil.copytree(clone.path, folder / "whole", symlinks=True)
        Clone(folder / "whole").repro("train")

    folder = once(tmp_path_factory, "two-processes", make)
    return Clone(folder / "clone"), Clone(folder / "whole").outputs()


@pytest.fixture(scope="session")
def answered_by_two(of_two_processes: tuple[Clone, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The clone in which they trained, once they have answered the test set too."""

    def make(path: Path) -> None:
        shutil.copytree(of_two_processes[0].path.parent / "whole", path, symlinks=True)
        assert Clone(path).repro("predict") == {"predict"}

    return Clone(once(tmp_path_factory, "answered-by-two", make))
