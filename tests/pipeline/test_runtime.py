"""qlora/runtime is no stage's dependency: neither its settings nor its functions can change a byte of an output."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora import params
from qlora.params import Params
from tests.pipeline.clone import Clone

OTHER_SETTINGS: dict[str, Any] = {
    "num_workers": 2,
    "save_steps": 1,
    "save_minutes": None,
    "report_to": "tensorboard",
    "allow_other_versions": True,
    "progress": False,
}


def run_all(values: Params, out: Path) -> dict[str, bytes]:
    """Every stage in this process, each from the outputs of the one before; the bytes of all outputs by their name."""
    from stages.evaluate import evaluate
    from stages.predict import predict
    from stages.prepare import prepare
    from stages.train import train

    manifests, prepared, predictions, metrics = Path("models/base"), out / "prepared", out / "predictions", out / "metrics"
    prepare(values, prepared=prepared, report=out / "prepare.json", notes=out / "notes")
    common = {"test": prepared / "test.jsonl", "manifests": manifests, "notes": out / "notes"}
    predict(values, predictions=predictions / "base.jsonl", **common)
    train(
        values,
        train=prepared / "train.jsonl",
        validation=prepared / "validation.jsonl",
        manifests=manifests,
        adapter_folder=out / "adapter",
        report=out / "train.json",
        metrics=metrics,
        notes=out / "notes",
    )
    predict(values, predictions=predictions / "tuned.jsonl", adapter_folder=out / "adapter", **common)
    evaluate(
        values,
        test=prepared / "test.jsonl",
        predictions=predictions,
        train_report=out / "train.json",
        metrics=metrics,
        report=out / "evaluation.json",
        page=out / "report.html",
        notes=out / "notes",
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != "notes"}


def as_built(clone: Clone) -> dict[str, bytes]:
    """The outputs of `dvc repro`, by the names that `run_all` gives them."""
    names = {"data/prepared/": "prepared/", "data/predictions/": "predictions/", "models/adapter/": "adapter/", "reports/": ""}
    found = {}
    for path, content in clone.outputs().items():
        for old, new in names.items():
            path = new + path.removeprefix(old) if path.startswith(old) else path
        found[path] = content
    return found


def test_other_settings_of_runtime_give_the_same_bytes(inside: Clone, tmp_path: Path) -> None:
    values = params.load(Path("params.yaml"))
    assert all(getattr(values.runtime, name) != value for name, value in OTHER_SETTINGS.items() if name != "progress")
    # Ray is another package's engine: tests/unit/test_ray_workers.py compares its bytes.
    assert {*OTHER_SETTINGS, "engine"} == set(type(values.runtime).model_fields)
    varied = values.model_copy(update={"runtime": values.runtime.model_copy(update=OTHER_SETTINGS)})
    assert run_all(varied, tmp_path / "out") == as_built(inside)
    assert list(Path(".dvc/tmp/tensorboard").rglob("events.out.*")), "the live view was asked for"


def test_functions_of_runtime_that_do_nothing_give_the_same_bytes(inside: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.prediction import journal, test_set
    from qlora.training import checkpoints
    from stages import evaluate, predict, prepare, train

    class Nothing:
        noted, can_wait = None, False

        def __enter__(self) -> "Nothing":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, *_: object) -> None:
            pass

        def count(self, **_: object) -> None:
            pass

        def close(self) -> None:
            pass

    @contextmanager
    def nothing(*_: object, **__: object) -> Iterator[Nothing]:
        yield Nothing()

    for module in (prepare, predict, train, evaluate):
        monkeypatch.setattr(module, "record_environment", lambda *_: None)
    for module in (predict, train):
        monkeypatch.setattr(module, "timed", nothing)
    monkeypatch.setattr(train, "Interruption", Nothing)
    monkeypatch.setattr(predict, "stopping_with", nothing)
    for module in (checkpoints, journal):
        monkeypatch.setattr(module, "try_lock", lambda _: Nothing())
    monkeypatch.setattr(test_set.progress_bars, "bar", nothing)
    monkeypatch.setattr(logging.getLogger("qlora"), "disabled", True)
    assert run_all(params.load(Path("params.yaml")), tmp_path / "out") == as_built(inside)
    assert not (tmp_path / "out" / "notes").exists()
