"""Which kernels a GPU would run for the recipe of a 24 GB card, traced with tensors that have shapes and types but no memory and no GPU.

Skipped with a CPU build of torch. Backward passes ask for a real device.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from trl.trainer.utils import add_fused_lm_head

from qlora.model.attention import packed_rows
from qlora.params import Params
from qlora.training.lora import leave_inputs_to_autocast, lora_config
from tools import preflight

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
TOKENS, LAYERS = 3072, 2


class Operators(TorchDispatchMode):
    """Every operator that ran, and the largest float32 tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.float32, self.to_host = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        inputs = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        for tensor in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(tensor, torch.Tensor):
                self.float32 = max(self.float32, tensor.numel() if tensor.dtype == torch.float32 else 0)
                self.to_host += tensor.device.type == "cpu" and any(one.device.type == "cuda" for one in inputs)
        return returned


@pytest.fixture(scope="module")
def recipe() -> Params:
    return preflight.of_recipe("llama3-8b-rtx4090")


@pytest.fixture
def model(recipe: Params) -> Iterator[Any]:
    """Two layers of Llama-3-8B with the recipe's adapter, on a GPU that is not there."""
    config = preflight.shape_of(recipe.base_model.name)
    config.num_hidden_layers = LAYERS
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=recipe.base_model.attn_implementation)
        base.requires_grad_(False)
        add_fused_lm_head(base)
        made = get_peft_model(base, lora_config(recipe.lora, base))
    leave_inputs_to_autocast(made, recipe)
    with FakeTensorMode():
        for module in made.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    dtype = torch.float32 if weight.requires_grad else weight.dtype
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(weight.shape, dtype=dtype, device="cuda"), requires_grad=weight.requires_grad
                    )
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        yield made


def test_a_training_pass_runs_the_varlen_kernel_without_mask_or_copies(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast switches itself off where there is no GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    begins = torch.empty(12, dtype=torch.int32, device="cuda")
    ids = torch.empty(1, TOKENS, dtype=torch.long, device="cuda")
    inputs = {"input_ids": ids, "labels": ids, "position_ids": ids, "cu_seq_lens_q": begins, "max_length_q": 700, "use_cache": False}
    model.train()
    with Operators() as operators, torch.autocast("cuda", torch.bfloat16), packed_rows(inputs):
        hidden = model.get_base_model().model(**{name: value for name, value in inputs.items() if name != "labels"}).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    assert operators.names.count("torch_attn._varlen_attn.default") == LAYERS
    assert not [name for name in operators.names if "scaled_dot_product" in name or "tril" in name or "repeat_interleave" in name]
    # The widest input of a product, once: nothing of tokens x tokens or x vocabulary.
    assert operators.float32 <= TOKENS * 14_336
    assert operators.to_host == 0
    assert not [name for name in operators.names if "_local_scalar_dense" in name]


def test_a_step_of_an_answer_copies_no_keys_and_waits_for_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel sdpa takes is decided by a real device; what it is called with is seen here."""
    rows, before = 16, 300
    called: list[dict[str, Any]] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **options: called.append({"key": key.shape, **options}) or attend(query, key, value, **options),
    )
    model.eval()
    cache = DynamicCache()
    with torch.no_grad():
        ids = torch.empty(rows, before, dtype=torch.long, device="cuda")
        # A cache of the prompt, as the first pass leaves it.
        for layer in range(LAYERS):
            cache.update(*(torch.empty(rows, 8, before, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)), layer)
        positions = torch.empty(rows, 1, dtype=torch.long, device="cuda")
        with Operators() as operators:
            logits = model(input_ids=ids[:, :1], position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits.shape == (rows, 1, 128_256)
    assert [call["key"] for call in called] == [(rows, 8, before + 1, 128)] * LAYERS
    assert all(call["attn_mask"] is None and call["enable_gqa"] for call in called)
    assert operators.to_host == 0
    assert not [name for name in operators.names if "_local_scalar_dense" in name]
