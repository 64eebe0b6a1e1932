"""What the stage writes for base model and adapter, what it refuses, and that it leaves everything as it was then."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from qlora import params
from qlora.core import dvc_lock
from qlora.core.errors import InputError, StoppedError
from qlora.core.files import read_jsonl, write_jsonl
from qlora.model import adapter, loading
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer
from qlora.params import Params
from qlora.prediction import generation, test_set
from qlora.runtime.signals import SIGNALS
from qlora.training.lora import lora_config
from stages.predict import predict
from tests.unit.trainings import changed

BASE = Path("models/base/tiny")
ROW = {
    "id": "1",
    "category": "c",
    "messages": [{"role": "user", "content": "Spell cat."}, {"role": "assistant", "content": "c-a-t"}],
}
LONG = {**ROW, "id": "2", "messages": [{"role": "user", "content": "Spell cat. " * 400}, {"role": "assistant", "content": "c-a-t"}]}
FILES = ("tuned.jsonl", "tuned_batches.jsonl", "tuned_counts.json")


@pytest.fixture(autouse=True)
def _unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unfinished run keeps is in a folder of the test's own."""
    real = dvc_lock.unfinished_folder
    monkeypatch.setattr("stages.predict.unfinished_folder", lambda *arguments: tmp_path / "unfinished" / real(*arguments).name)


@pytest.fixture
def values() -> Params:
    return changed(params.load(Path("params.yaml")), predict__max_new_tokens=2)


@pytest.fixture(scope="module")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other stages would have made: a test set, and an adapter that changes nothing."""
    folder, values = tmp_path_factory.mktemp("inputs"), params.load(Path("params.yaml"))
    base = loading.load_model(values.base_model, BASE, torch.device("cpu"), progress=False)
    model = get_peft_model(base, lora_config(values.lora, base))
    adapter.publish(model, ChatTemplate(load_tokenizer(BASE), values.chat), folder / "adapter", "tiny")
    write_jsonl(folder / "test.jsonl", [ROW])
    return folder


@pytest.fixture
def inputs(_inputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(_inputs, tmp_path / "inputs")
    return tmp_path / "inputs"


def answer(values: Params, folder: Path, side: str) -> None:
    adapter_folder = folder / "adapter" if side == "tuned" else None
    paths = {"test": folder / "test.jsonl", "predictions": folder / "predictions" / f"{side}.jsonl", "notes": folder / "notes"}
    predict(values, manifests=Path("models/base"), adapter_folder=adapter_folder, **paths)


def without_times(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "notes"}


def test_an_adapter_that_changes_nothing_answers_as_the_base_model(inputs: Path, values: Params) -> None:
    for side in ("base", "tuned"):
        answer(values, inputs, side)
    for tuned in FILES:
        base = inputs / "predictions" / tuned.replace("tuned", "base")
        assert (inputs / "predictions" / tuned).read_bytes() == base.read_bytes()
    (line,) = read_jsonl(inputs / "predictions" / "tuned.jsonl")
    likelihood, answered = ["nll_sum", "stop_nll", "tokens", "bytes"], ["answer", "answer_tokens", "stopped"]
    assert list(line) == ["id", "turn", "category", "seed", *likelihood, *answered], "a line holds nothing that is scored"
    assert read_jsonl(inputs / "predictions" / "tuned_batches.jsonl") == [{"batch": 0, "turns": [["1", 0]]}]
    assert json.loads((inputs / "predictions" / "tuned_counts.json").read_bytes())["conversations"] == 1
    for notes in ("environment.json", "throughput.json"):
        assert set(json.loads((inputs / "notes" / notes).read_bytes())) == {"baseline", "predict"}


@contextmanager
def counted(module: Any, name: str, signal_at: int | None = None) -> Iterator[list[int]]:
    """A list with an entry for each call of a function; a signal comes at one of the calls.

    A stage that a signal stopped ignores further ones: the handlers are put back.
    """
    calls: list[int] = []
    real, handlers = getattr(module, name), {number: signal.getsignal(number) for number in SIGNALS}

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == signal_at:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield calls
    for number, handler in handlers.items():
        signal.signal(number, handler)


def asked(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Spell cat." + "?" * number}, {"role": "assistant", "content": "c-a-t"}]
    return {**ROW, "id": str(number), "messages": messages}


def predicted(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_stopped_run_resumes_to_the_same_bytes(inputs: Path, values: Params, sampled: bool) -> None:
    write_jsonl(inputs / "test.jsonl", [asked(number) for number in range(6)])
    # Some of the short prompts share a batch.
    values = changed(values, predict__batch_tokens=60, predict__do_sample=sampled, predict__temperature=3.0)
    values = changed(values, predict__generation_seeds=[3, 4] if sampled else [0])
    answer(values, inputs, "base")
    whole = predicted(inputs)
    batches = len(read_jsonl(inputs / "predictions/base_batches.jsonl")) * (2 if sampled else 1)
    assert 2 < batches < (12 if sampled else 6)
    shutil.rmtree(inputs / "predictions")
    with counted(test_set, "turn_nlls", 5), pytest.raises(StoppedError, match=r"SIGTERM: 4 likelihood\(s\) and 0 answer\(s\) are kept, run again to"):
        answer(values, inputs, "base")
    with counted(test_set, "turn_nlls") as scored, counted(generation, "_generate_batch", 3):
        with pytest.raises(StoppedError, match=r"SIGTERM: 6 likelihood\(s\) and [2-4] answer\(s\) are kept"):
            answer(values, inputs, "base")
        assert len(scored) == 2
    assert not (inputs / "predictions").exists()
    with counted(test_set, "turn_nlls") as scored, counted(generation, "_generate_batch") as answered:
        answer(values, inputs, "base")
        assert (len(scored), len(answered)) == (0, batches - 2)
    assert predicted(inputs) == whole
    assert list((inputs.parent / "unfinished").iterdir()) == [], "another run makes all of it"


@pytest.mark.parametrize("change", ["batch_tokens", "test set"])
def test_another_run_takes_nothing_of_one_that_was_stopped(inputs: Path, values: Params, change: str) -> None:
    with counted(generation, "_generate_batch", 1), pytest.raises(StoppedError, match="1 likelihood"):
        answer(values, inputs, "base")
    if change == "test set":
        write_jsonl(inputs / "test.jsonl", [{**ROW, "category": "other"}])
    else:
        values = changed(values, predict__batch_tokens=values.predict.batch_tokens + 1)
    with counted(test_set, "turn_nlls") as scored:
        answer(values, inputs, "base")
        assert len(scored) == 1


def without_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "adapter")


def foreign_adapter(folder: Path) -> None:
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("models/base/tiny", "models/base/large"), encoding="utf-8")


def empty_test(folder: Path) -> None:
    (folder / "test.jsonl").write_bytes(b"")


def long_test(folder: Path) -> None:
    write_jsonl(folder / "test.jsonl", [ROW, LONG])


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (without_adapter, "adapter-missing"),
        (foreign_adapter, "adapter-foreign"),
        (empty_test, "test-all-dropped"),
        (long_test, "test-too-long"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(inputs: Path, values: Params, damage: Callable[[Path], None], code: str) -> None:
    damage(inputs)
    before = without_times(inputs)
    with pytest.raises(InputError) as error:
        answer(changed(values, predict__on_too_long="error"), inputs, "tuned")
    assert (error.value.code, error.value.exit_code) == (code, 2)
    assert without_times(inputs) == before
