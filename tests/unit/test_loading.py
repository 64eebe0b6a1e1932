"""What can't be loaded is named; the rest of qlora/model/loading.py is tested where models are used."""

import json
import shutil
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.core.errors import InputError, MachineError
from qlora.model.config import load_tokenizer
from qlora.model.device import PREDICTION_SETTINGS, translate_out_of_memory
from qlora.model.loading import QuantiseElsewhere, load_model
from qlora.params import Params
from tests.unit.trainings import TINY, changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"\[tokenizer-unloadable\] .*model holds no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("change", [{"model_type": "no such type"}, {"hidden_size": 64}])
def test_a_model_that_transformers_can_not_make_is_named(folder: Path, default_params: Params, change: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[base-model-unloadable\] .*model can't be loaded"):
        load_model(default_params.base_model, folder, torch.device("cpu"), progress=False)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_weights_that_are_missing_are_not_made_up(folder: Path, default_params: Params, load_in_4bit: bool) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    gone = "model.layers.3.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != gone}, path, metadata={"format": "pt"})
    params = changed(default_params, base_model__load_in_4bit=load_in_4bit)
    with pytest.raises(InputError, match=rf"\[base-model-unloadable\] .*lacks 1 of the model's weights, such as {gone}"):
        load_model(params.base_model, folder, torch.device("cpu"), progress=False)


def test_no_memory_for_the_weights_is_not_the_models_fault(default_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MachineError, match=r"\[out-of-memory\]"), translate_out_of_memory(PREDICTION_SETTINGS, default_params):
        load_model(default_params.base_model, TINY, torch.device("cpu"), progress=False)


def test_attention_that_is_not_installed_is_the_machines(default_params: Params) -> None:
    params = changed(default_params, base_model__attn_implementation="flash_attention_2")
    with pytest.raises(MachineError, match=r"\[attention-missing\] base_model.attn_implementation = 'flash_attention_2'"):
        load_model(params.base_model, TINY, torch.device("cpu"), progress=False)


def in_4_bits(params: Params, **changes: Any) -> Any:
    return changed(params, base_model__load_in_4bit=True, **changes).base_model


def state_of(weight: Any) -> dict[str, Any]:
    """Everything that a 4-bit weight is made of, with the tensors' bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), str(value.device), list(value.shape), value.numpy().tobytes()
        return {name: plain(part) for name, part in vars(value).items()} if hasattr(value, "absmax") else value

    assert weight.module.quant_state is weight.quant_state
    kind = (weight.quant_type, weight.blocksize, weight.compress_statistics, weight.quant_storage, weight.bnb_quantized, weight.requires_grad)
    return {"kind": kind, "weight": plain(weight.data), "state": plain(weight.quant_state)}


@pytest.mark.parametrize(("storage", "double_quant"), [("uint8", True), ("float32", False)])
def test_weights_that_are_quantised_elsewhere_are_the_same_bytes(
    default_params: Params, monkeypatch: pytest.MonkeyPatch, storage: str, double_quant: bool
) -> None:
    """A stand-in for a GPU: copies are there, as long as anything holds them."""
    params = in_4_bits(default_params, base_model__bnb_4bit_quant_storage=storage, base_model__bnb_4bit_use_double_quant=double_quant)
    there: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def send(self: Any, weight: torch.Tensor) -> torch.Tensor:
        assert self.device == torch.device("cpu:0")
        held.append(sum(one() is not None for one in there))
        sent = weight.clone()
        there.append(weakref.ref(sent))
        return sent

    def send_back(self: Any, weight: Any, place: torch.device) -> Any:
        there.append(weakref.ref(weight.data))
        copy = deepcopy(weight)
        copy.module.quant_state = copy.quant_state
        return back(self, copy, place)

    back = QuantiseElsewhere.back
    monkeypatch.setattr(QuantiseElsewhere, "there", send)
    monkeypatch.setattr(QuantiseElsewhere, "back", send_back)
    cpu = torch.device("cpu")
    expected = dict(load_model(params, TINY, cpu, progress=False).named_parameters())
    assert held == [], "without quantise_on nothing is sent"
    found = dict(load_model(params, TINY, cpu, progress=False, quantise_on=torch.device("cpu:0")).named_parameters())
    quantised = [name for name, weight in expected.items() if hasattr(weight, "quant_state")]
    assert len(quantised) == len(held) > 20
    assert set(held) == {0}, "each is gone before the next comes"
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert state_of(found[name]) == state_of(weight) if name in quantised else torch.equal(found[name], weight), name
    load_model(params, TINY, cpu, progress=False)
    assert len(held) == len(quantised), "later loads are as before"


def test_weights_that_are_quantised_already_must_be_asked_for(folder: Path, default_params: Params) -> None:
    asked = {bits: changed(default_params, **{f"base_model__load_in_{bits}bit": True}).base_model for bits in (4, 8)}
    for bits, other in ((4, 8), (8, 4)):
        load_model(asked[bits], TINY, torch.device("cpu"), progress=False).save_pretrained(folder)
        for wrong in (default_params.base_model, asked[other]):
            with pytest.raises(InputError, match=rf"\[base-model-quantised\] .*quantised, but base_model.load_in_{bits}bit is false"):
                load_model(wrong, folder, torch.device("cpu"), progress=False)
        with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
            assert getattr(load_model(asked[bits], folder, torch.device("cpu"), progress=False), f"is_loaded_in_{bits}bit")


def test_8_bit_layers_keep_no_inputs_and_log_no_casts(default_params: Params, caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes holds inputs outside of what autograd saves, which activation checkpointing can't free, for a gradient that nothing asks for."""
    params = changed(default_params, base_model__load_in_8bit=True).base_model
    layer = load_model(params, TINY, torch.device("cpu"), progress=False).model.layers[0].mlp.up_proj
    scales = layer.weight.SCB[:, None] / 127
    for training in (True, False):
        layer.train(training)
        inputs = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        between = inputs * 2
        seen = weakref.ref(between)
        output = layer(between)
        del between
        assert seen() is None
        output.sum().backward()
        torch.testing.assert_close(inputs.grad, 2 * (layer.weight * scales).sum(0).expand(3, -1))
    assert not caplog.records
