"""What the stage refuses, and that it leaves everything as it was then."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from qlora import adapter, base_model, params
from qlora.chat_template import ChatTemplate
from qlora.errors import InputError
from qlora.new_adapter import lora_config
from qlora.params import Params
from qlora.records import write_csv, write_jsonl
from stages.baseline import baseline
from stages.evaluate import evaluate

BASE = Path("models/base/tiny")
ROW = {
    "id": "1",
    "category": "c",
    "messages": [{"role": "user", "content": "Spell cat."}, {"role": "assistant", "content": "c-a-t"}],
}
LONG = {**ROW, "id": "2", "messages": [{"role": "user", "content": "Spell cat. " * 400}, {"role": "assistant", "content": "c-a-t"}]}


def paths(folder: Path) -> dict[str, Path]:
    inputs = ("adapter_folder", "test", "base_predictions", "base_report", "train_loss", "eval_loss")
    outputs = ("predictions", "batches", "report", "categories", "scores", "page", "throughput", "made_by")
    return {"manifests": Path("models/base"), **{name: folder / name for name in (*inputs, *outputs)}}


@pytest.fixture
def values() -> Params:
    read = params.load(Path("params.yaml"))
    return read.model_copy(update={"evaluate": read.evaluate.model_copy(update={"max_new_tokens": 2})})


@pytest.fixture(scope="module")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other stages would have made."""
    folder, values = tmp_path_factory.mktemp("inputs"), params.load(Path("params.yaml"))
    values = values.model_copy(update={"evaluate": values.evaluate.model_copy(update={"max_new_tokens": 2})})
    base = base_model.load_model(values.base_model, BASE, torch.device("cpu"), progress=False)
    model = get_peft_model(base, lora_config(values.lora, base))
    adapter.publish(model, ChatTemplate(base_model.load_tokenizer(BASE), values.chat), folder / "adapter_folder", "tiny")
    write_jsonl(folder / "test", [ROW])
    for name in ("train_loss", "eval_loss"):
        write_csv(folder / name, ["step", "loss"], [(1, 2.0)])
    made = {"predictions": "base_predictions", "report": "base_report", "batches": "base_batches", "throughput": "throughput", "made_by": "made_by"}
    baseline(values, test=folder / "test", manifests=Path("models/base"), **{name: folder / file for name, file in made.items()})
    return folder


@pytest.fixture
def inputs(_inputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(_inputs, tmp_path / "inputs")
    return tmp_path / "inputs"


def test_an_adapter_that_changes_nothing_makes_no_difference(inputs: Path, values: Params) -> None:
    evaluate(values, **paths(inputs))
    assert (inputs / "predictions").read_bytes() == (inputs / "base_predictions").read_bytes()
    assert "no difference shown" in (inputs / "page").read_text(encoding="utf-8")


def without_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "adapter_folder")


def foreign_adapter(folder: Path) -> None:
    config = folder / "adapter_folder" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("models/base/tiny", "models/base/large"), encoding="utf-8")


def empty_test(folder: Path) -> None:
    (folder / "test").write_bytes(b"")


def other_test(folder: Path) -> None:
    write_jsonl(folder / "test", [{**ROW, "id": "3"}])


def long_test(folder: Path) -> None:
    write_jsonl(folder / "test", [ROW, LONG])


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (without_adapter, "adapter-missing"),
        (foreign_adapter, "adapter-foreign"),
        (empty_test, "test-all-dropped"),
        (other_test, "compare-unaligned"),
        (long_test, "test-too-long"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(inputs: Path, values: Params, damage: Any, code: str) -> None:
    damage(inputs)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    strict = values.model_copy(update={"evaluate": values.evaluate.model_copy(update={"on_too_long": "error"})})
    with pytest.raises(InputError) as error:
        evaluate(strict, **paths(inputs))
    assert (error.value.code, error.value.exit_code) == (code, 2)
    after = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file() and path.name not in ("throughput", "made_by")}
    assert after == {path: content for path, content in before.items() if path.name not in ("throughput", "made_by")}
