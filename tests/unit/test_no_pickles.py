"""Weights are read from safetensors alone: a pickle that would run something when it is loaded is refused, and runs nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.core.errors import InputError
from qlora.model import adapter
from qlora.model.config import load_tokenizer
from qlora.model.loading import load_config, load_model
from qlora.model.manifest import make_manifest, require_own_weights
from qlora.params import Params
from qlora.training import checkpoints
from qlora.training.tokenization import Example
from tests.unit.trainings import TINY, changed, run

CPU = torch.device("cpu")
CODE = "import os\nos.mkdir(os.environ['MARKER'])\n"


class Running:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made by whoever unpickles, or imports the code of a model: both are tried out."""
    marker = tmp_path / "ran"
    monkeypatch.setenv("MARKER", str(marker))
    pickle.loads(pickle.dumps(Running(marker)))
    assert marker.exists()
    marker.rmdir()
    exec(CODE)
    marker.rmdir()
    return marker


@pytest.fixture(params=["pickle", "torch"])
def pickled(request: pytest.FixtureRequest, marker: Path) -> Callable[[Path], None]:
    """Writes such a file, as pickle or torch do."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(Running(marker)))
        else:
            torch.save(Running(marker), path)

    return write


@pytest.fixture
def published(tiny_model: Any, template: Any, default_params: Params, tmp_path: Path) -> Path:
    from peft import get_peft_model

    from qlora.training.lora import lora_config

    adapter.publish(get_peft_model(tiny_model, lora_config(default_params.lora, tiny_model)), template, tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def say(path: Path, **values: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**record, **values}), encoding="utf-8")


def base(params: Params, folder: Path = TINY) -> Any:
    return load_model(params.base_model, folder, CPU, progress=False)


def test_an_adapter_in_a_pickle_is_refused(published: Path, default_params: Params, pickled: Callable[[Path], None], marker: Path) -> None:
    (published / adapter.WEIGHTS).unlink()
    pickled(published / "adapter_model.bin")
    with pytest.raises(InputError, match=r"\[adapter-not-safetensors\] .* holds no adapter_model.safetensors"):
        adapter.load_adapter(base(default_params), published, "tiny")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change", [{"peft_type": "XLORA", "adapters": {"0": "elsewhere"}}, {"megatron_config": {"a": 1}, "megatron_core": "model_code"}]
)
def test_an_adapter_that_loads_or_imports_more_is_refused(
    published: Path, default_params: Params, marker: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    (published.parent / "model_code.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(published.parent)
    say(published / adapter.CONFIG, **change)
    with pytest.raises(InputError, match=r"\[adapter-unloadable\] .*not that of a plain LoRA adapter"):
        adapter.load_adapter(base(default_params), published, "tiny")
    assert not marker.exists()


def test_a_checkpoint_with_a_pickled_adapter_is_not_resumed_from(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, pickled: Callable[[Path], None], marker: Path
) -> None:
    """Sealed with sums that fit, as by someone who knows how."""
    params = changed(few_steps, runtime__save_steps=1, train__batch_size=4)
    run(params, examples, tokenizer, tmp_path / "run", 2)
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / adapter.WEIGHTS).unlink()
    pickled(folder / "adapter_model.bin")
    checkpoints._seal(folder)
    with pytest.raises(InputError, match=r"\[adapter-not-safetensors\] .*checkpoint-2 holds no"):
        run(params, examples, tokenizer, tmp_path / "run")
    assert not marker.exists()


SPOILED: dict[str, Callable[[Path, Callable[[Path], None]], None]] = {
    "index to a pickle": lambda folder, write: (
        write(folder / "x.bin"),
        say(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "x.bin"}),
    )[1],
    "index to an index": lambda folder, write: say(folder / "model.safetensors.index.json", weight_map={"a": "x.safetensors.index.json"}),
    "index elsewhere": lambda folder, write: (
        write(folder.parent / "x.safetensors"),
        say(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "../x.safetensors"}),
    )[1],
    "index to the root": lambda folder, write: say(folder / "model.safetensors.index.json", weight_map={"a": "/x.safetensors"}),
    "index of no names": lambda folder, write: say(folder / "model.safetensors.index.json", weight_map={"a": 7}),
    "config names a pickle": lambda folder, write: (
        write(folder / "adapter_model.bin"),
        say(folder / "config.json", transformers_weights="adapter_model.bin"),
    )[1],
    "config names a folder": lambda folder, write: say(folder / "config.json", transformers_weights="sub/model.safetensors"),
    "config of a part": lambda folder, write: say(folder / "config.json", text_config={"transformers_weights": "../x.safetensors"}),
    "config names an index": lambda folder, write: (
        say(folder / "other.safetensors.index.json", weight_map={"a": "x.bin"}),
        say(folder / "config.json", transformers_weights="other.safetensors.index.json"),
    )[1],
    "an adapter": lambda folder, write: (write(folder / "adapter_model.bin"), say(folder / "adapter_config.json", peft_type="LORA"))[1],
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_model_that_names_other_weights_is_refused(
    model: Path, default_params: Params, pickled: Callable[[Path], None], marker: Path, name: str
) -> None:
    SPOILED[name](model, pickled)
    for use in (lambda: base(default_params, model), lambda: make_manifest(model)):
        with pytest.raises(InputError, match=r"\[base-model-not-safetensors\] .*model would load"):
            use()
    assert not marker.exists()


def test_an_index_of_brackets_is_refused(model: Path, default_params: Params) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"\[base-model-unloadable\] "):
        base(default_params, model)


def test_a_model_of_several_files_is_taken(model: Path, default_params: Params) -> None:
    """With the index of a pickle beside it, as many have it, which is not read."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    for number, name in enumerate(weights):
        save_file({name: weights[name]}, model / f"model-{number}.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(weights)}
    say(model / "model.safetensors.index.json", metadata={}, weight_map=files)
    say(model / "pytorch_model.bin.index.json", metadata={}, weight_map=dict.fromkeys(files, "pytorch_model.bin"))
    require_own_weights(model)
    assert make_manifest(model).files.keys() >= set(files.values())
    assert torch.equal(base(default_params, model).get_input_embeddings().weight, base(default_params).get_input_embeddings().weight)


def test_a_model_with_pickles_alone_is_refused(model: Path, default_params: Params, pickled: Callable[[Path], None], marker: Path) -> None:
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"\[base-model-unloadable\]"):
        base(default_params, model)
    with pytest.raises(InputError, match=r"\[base-model-no-weights\]"):
        make_manifest(model)
    assert not marker.exists()


def test_a_pickle_beside_the_weights_is_not_read(model: Path, default_params: Params, pickled: Callable[[Path], None], marker: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pkl", "tokenizer.pkl", "vocab.pkl"):
        pickled(model / name)
    base(default_params, model)
    load_tokenizer(model)
    assert make_manifest(model).files.keys() == make_manifest(TINY).files.keys()
    assert not marker.exists()


def test_code_that_a_model_brings_is_not_run(model: Path, default_params: Params, marker: Path) -> None:
    (model / "code.py").write_text(CODE, encoding="utf-8")
    say(model / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    say(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}, tokenizer_class="Tokenizer")
    uses: list[Callable[[], object]] = [lambda: load_config(model), lambda: load_tokenizer(model), lambda: base(default_params, model)]
    for use in uses:
        try:
            use()
        except InputError as error:
            # Asked for, it is refused; of a known type, it is not needed.
            print(error)
        assert not marker.exists()
    say(model / "config.json", model_type="unknown")
    with pytest.raises(InputError, match=r"\[base-model-unloadable\]"):
        load_config(model)
    assert not marker.exists()
