"""Trainings on a GPU, as `train` makes them: what they take is what was estimated, twice the same bytes, and resumed the same.

On a machine without one the same set-up runs in a tiny shape on the CPU, so that it is known to work before a card is rented.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import Bench, same_bytes
from qlora.model import attention
from qlora.model.attention import attend_apart, varlen_attention
from qlora.training.checkpoints import Checkpoints

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="torch sees no GPU here")
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An eighth of Llama-3-8B with its vocabulary."""
    return Bench("llama3-8b, eighth" if CUDA else "tiny", tmp_path_factory.mktemp("base"), updates=1)


@pytest.mark.parametrize(("four_bit", "checkpointing"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_memory_is_that_of_the_estimate(bench: Bench, four_bit: bool, checkpointing: bool) -> None:
    found = bench.train(base_model__load_in_4bit=four_bit, hardware__activation_checkpointing=checkpointing)
    print(f"4-bit {four_bit}, checkpointing {checkpointing}: {found}")
    if CUDA:
        assert found["estimate_to_peak"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", *(pytest.param(name, marks=needs_gpu) for name in ("adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"))],
)
def test_it_is_twice_the_same_and_resumed_the_same(bench: Bench, optim: str) -> None:
    assert same_bytes(bench, optim) == {"twice_the_same": True, "resumed_the_same": True}


@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_computes_what_the_loop_over_conversations_does(window: int | None) -> None:
    """Outputs and gradients of the first against those of the second in float32; deterministic mode gives the same bits twice."""
    torch.manual_seed(0)
    begins = torch.tensor([0, 1, 130, 131, 900, 1024], dtype=torch.int32, device=DEVICE)
    shapes = {"query": (1, 32, 1024, 128), "key": (1, 8, 1024, 128), "value": (1, 8, 1024, 128)}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}
    upstream = torch.randn(1, 1024, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    options = {"cu_seq_lens_q": begins, "max_length_q": 769, "scaling": 128**-0.5, "sliding_window": window}

    def computed() -> list[torch.Tensor]:
        output, _ = varlen_attention(torch.nn.Module(), *tensors.values(), None, **options)
        return [output, *torch.autograd.grad(output, list(tensors.values()), upstream)]

    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        first, second = computed(), computed()
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    flat = [tensor.transpose(1, 2)[0] for tensor in exact.values()]
    output = attend_apart(*flat, begins.tolist(), scale=128**-0.5, window=window)[None]
    expected = [output, *torch.autograd.grad(output, list(exact.values()), upstream.float())]
    for a, b in zip(first, expected, strict=True):
        assert (a.float() - b).norm() / b.norm() < 0.01


def test_no_pass_builds_a_mask_or_copies_keys_and_values(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention is called with on the path that `train` takes."""
    seen: list[dict[str, Any]] = []

    def spied(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        seen.append({"query": query, "key": key, "arguments": arguments, **options})
        return kernel(query, key, value, *arguments, **options)

    name = "varlen_attn" if CUDA else "attend_apart"
    kernel = getattr(attention, name)
    monkeypatch.setattr(attention, name, spied)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: pytest.fail("sdpa was called"))
    monkeypatch.setattr(attention, "sdpa_mask", lambda **_: pytest.fail("a mask was made"))
    with Checkpoints(tmp_path) as checkpoints:
        bench.trainer(bench.params(train__max_steps=1), checkpoints).train()
    assert seen
    assert all(call["key"].shape[1] < call["query"].shape[1] for call in seen)
    assert {call["query"].dtype for call in seen} == {torch.bfloat16}


def test_dropout_scales_what_it_keeps_the_same_in_either_type() -> None:
    """Why the inputs of adapters stay in bfloat16 on a GPU, where only the mask differs; the CPU rounds its factor."""
    inputs = torch.randn(3, 1000, 4097, dtype=torch.bfloat16, device=DEVICE)
    kept = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        kept.append(torch.nn.functional.dropout(inputs.to(dtype), 0.05).bfloat16())
    of_both = (kept[0] != 0) & (kept[1] != 0)
    assert of_both.float().mean() > 0.85
    assert torch.equal(kept[0][of_both], kept[1][of_both]) == CUDA
