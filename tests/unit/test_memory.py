"""What a training is said to need is what it takes."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora.params import Params
from qlora.training import memory
from qlora.training.lora import leave_inputs_to_autocast, lora_config
from tests.unit.trainings import changed

SHAPES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def params(default_params: Params) -> Params:
    return changed(default_params, sequence__max_length=256, hardware__per_device_train_batch_size=1, base_model__bnb_4bit_compute_dtype="bfloat16")


def taken(params: Params, bits: int, config: Any, folder: Any) -> tuple[int, int]:
    """Bytes of the frozen weights, and of what autograd keeps, of a real model."""
    dtype = getattr(torch, params.base_model.dtype)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    quantised = {
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantised.get(bits))
    frozen = sum(weight.nbytes for weight in base.parameters())
    for module in base.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        frozen += state.absmax.nbytes + state.state2.absmax.nbytes if state else 0
        frozen += module.weight.SCB.nbytes if hasattr(module, "init_8bit_state") else 0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    model = get_peft_model(base, lora_config(params.lora, base)).train()
    leave_inputs_to_autocast(model, params)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, params.sequence.max_length, dtype=torch.long)
        # Two conversations of a packed row.
        positions = torch.arange(params.sequence.max_length)[None] % (params.sequence.max_length // 2)
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        output = model.get_base_model().base_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        total = sum(storage.nbytes() for storage in kept.values())
    del output
    return frozen, total


def test_first_weights_that_are_computed_take_no_more(params: Params) -> None:
    config = AutoConfig.for_model(**SIZES, **SHAPES["llama"])
    assert memory.estimate(changed(params, lora__init_lora_weights="pissa"), config) == memory.estimate(params, config)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("bfloat16", 4), ("bfloat16", 8)])
def test_weights_and_activations_are_those_of_a_real_model(params: Params, tmp_path: Any, family: str, dtype: str, bits: int) -> None:
    params = changed(params, base_model__dtype=dtype, base_model__load_in_4bit=bits == 4, base_model__load_in_8bit=bits == 8)
    config = AutoConfig.for_model(**SIZES, **SHAPES[family])
    found = memory.estimate(params, config)
    frozen, kept = taken(params, bits, config, tmp_path)
    print(f"{family} {dtype} {bits}: weights {found.weights / frozen:.3f}, activations {found.activations / kept:.3f}")
    assert found.weights == pytest.approx(frozen, rel=0.02)
    assert found.activations == pytest.approx(kept, rel=0.1)
