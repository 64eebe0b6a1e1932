"""What the stage writes for base model and adapter, what it refuses, and that it leaves everything as it was then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from qlora import params
from qlora.core.errors import InputError
from qlora.core.files import read_jsonl, write_jsonl
from qlora.model import adapter, loading
from qlora.model.chat_template import ChatTemplate
from qlora.params import Params
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


@pytest.fixture
def values() -> Params:
    return changed(params.load(Path("params.yaml")), predict__max_new_tokens=2)


@pytest.fixture(scope="module")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other stages would have made: a test set, and an adapter that changes nothing."""
    folder, values = tmp_path_factory.mktemp("inputs"), params.load(Path("params.yaml"))
    base = loading.load_model(values.base_model, BASE, torch.device("cpu"), progress=False)
    model = get_peft_model(base, lora_config(values.lora, base))
    adapter.publish(model, ChatTemplate(loading.load_tokenizer(BASE), values.chat), folder / "adapter", "tiny")
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
