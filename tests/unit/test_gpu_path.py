"""What a GPU takes and a CPU does not, seen on a CPU: TRL's other loss, types under autocast, and no large tensor that is not needed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.params import Params
from qlora.training.lora import leave_inputs_to_autocast, lora_config
from qlora.training.tokenization import IGNORE_INDEX, Example
from qlora.training.trainer import page_states
from tests.unit.test_trainer import trained, trainer_of
from tests.unit.trainings import adapted, assert_same, changed, results


def test_the_loss_as_a_gpu_computes_it_is_the_same(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU TRL scores the supervised places alone; on a CPU all of them. Also where a pass has none."""
    unsupervised = dataclasses.replace(examples[0], labels=[IGNORE_INDEX] * len(examples[0].ids))
    params = changed(few_steps, sequence__packing="none", train__batch_size=1, hardware__per_device_train_batch_size=1, train__max_steps=7)

    def learned(folder: Path) -> Any:
        return results(trained(params, [unsupervised, *examples[:6]], tokenizer, folder))

    weights, losses, _ = learned(tmp_path / "cpu")
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _: True)
    gpu_weights, gpu_losses, _ = learned(tmp_path / "gpu")
    assert [step for step, _ in losses] == [step for step, _ in gpu_losses]
    assert 0.0 in [loss for _, loss in gpu_losses]
    assert [loss for _, loss in gpu_losses] == pytest.approx([loss for _, loss in losses], rel=1e-5)
    assert all((weight - gpu_weights[name]).norm() <= 1e-3 * weight.norm() for name, weight in weights.items())


def test_an_adapter_over_4_bits_starts_as_it_was_made(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    """With the weights of lora.init_adapter, say, all of whose bits count: TRL rounds them to bfloat16."""
    params = changed(few_steps, base_model__load_in_4bit=True, base_model__dtype="bfloat16", base_model__bnb_4bit_compute_dtype="bfloat16")
    model = adapted(params)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.01)
    made = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(not torch.equal(weight, weight.bfloat16().float()) for weight in made.values())
    trainer = trainer_of(params, model, tokenizer, examples, [], tmp_path)
    kept = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert kept.keys() == made.keys()
    assert all(weight.dtype == torch.float32 and torch.equal(weight, made[name]) for name, weight in kept.items())


@pytest.mark.parametrize("four_bit", [False, True])
def test_inputs_left_to_autocast_give_the_same_bits(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, four_bit: bool
) -> None:
    """PEFT would copy each to float32 first. With dropout on a CPU they don't, and the copies stay."""
    params = changed(few_steps, base_model__load_in_4bit=four_bit, base_model__dtype="bfloat16", base_model__bnb_4bit_compute_dtype="bfloat16")
    dropped = [layer for layer in adapted(changed(params, lora__lora_dropout=0.1)).modules() if isinstance(layer, LoraLayer)]
    assert dropped
    assert all(layer.cast_input_dtype_enabled for layer in dropped)
    params = changed(params, lora__lora_dropout=0.0)

    def learned(folder: Path, *, cast: bool) -> Any:
        model = adapted(params)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert layers
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        trainer = trainer_of(params, model, tokenizer, examples, examples[:7], folder)
        trainer.train()
        return trainer

    assert_same(learned(tmp_path / "left", cast=False), results(learned(tmp_path / "cast", cast=True)))


class Largest(TorchDispatchMode):
    """The most elements of a float32 tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return returned


def test_no_copy_of_all_logits_is_made_in_float32(few_steps: Params, tokenizer: Any, tmp_path: Path) -> None:
    """As many as tokens of a row x vocabulary: 1.6 GB for a row of 3,072 tokens of Llama 3, and again in the backward pass."""
    tokens, vocabulary = 64, 100_000
    params = changed(
        few_steps, base_model__dtype="bfloat16", base_model__attn_implementation="varlen", sequence__max_length=tokens, train__batch_size=1
    )
    params = changed(params, hardware__per_device_train_batch_size=1, lora__lora_dropout=0.0, train__eval_strategy="no")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, **sizes)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="varlen").requires_grad_(False)
    model = get_peft_model(base, lora_config(params.lora, base))
    leave_inputs_to_autocast(model, params)
    ids = list(range(tokens))
    trainer = trainer_of(params, model, tokenizer, [Example(ids=ids, labels=ids, conversation="a")], [], tmp_path)
    with Largest() as largest:
        trainer.train()
    assert trainer.done_this_time() == {"tokens": few_steps.train.max_steps * tokens, "steps": few_steps.train.max_steps}
    assert 0 < largest.elements < tokens * vocabulary


def test_states_from_a_checkpoint_can_leave_the_gpu_again() -> None:
    """bitsandbytes reads them as plain tensors."""

    class Paged:
        is_paged = True

        def __init__(self) -> None:
            self.weight = torch.zeros(3)
            self.state = {self.weight: {"state1": torch.tensor([1, 2, 3], dtype=torch.uint8), "state2": torch.tensor([4.0, 5, 6]), "step": 7}}

        def get_state_buffer(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            buffer: Any = torch.zeros_like(weight, dtype=dtype)
            buffer.is_paged = True
            return buffer

    optimizer = Paged()
    page_states(optimizer)
    state: Any = optimizer.state[optimizer.weight]
    assert state["state1"].is_paged
    assert state["state2"].is_paged
    assert state["state1"].tolist() == [1, 2, 3]
    assert state["state1"].dtype == torch.uint8
    assert state["state2"].tolist() == [4.0, 5.0, 6.0]
    assert state["step"] == 7
    # None is made for an optimizer of another kind.
    page_states(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))
