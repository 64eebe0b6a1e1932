"""benchmarks/gpu.py times what `train` runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

import stages.train
from benchmarks import gpu
from benchmarks.gpu import Bench
from qlora.model import attention
from qlora.training import lora, trainer
from qlora.training.checkpoints import Checkpoints
from qlora.training.trainer import ExactTrainer
from tests.unit.test_trainer import trainer_of


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, Any]]:
    """What attention and loss are called with."""
    found: set[tuple[str, Any]] = set()
    attend, loss = attention.attend_apart, ExactTrainer.compute_loss

    def attended(query: Any, *arguments: Any, **options: Any) -> Any:
        found.update({("attention", query.dtype), ("autocast", torch.is_autocast_enabled("cpu"))})
        return attend(query, *arguments, **options)

    def computed(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        found.update({("inputs", tuple(sorted(inputs))), ("attention asked for", model.config._attn_implementation), ("training", model.training)})
        return loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(attention, "attend_apart", attended)
    monkeypatch.setattr(ExactTrainer, "compute_loss", computed)
    return found


def test_it_calls_what_the_stage_calls(seen: set[tuple[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    """Same functions, same attention in the same type, autocast, inputs and loss."""
    assert (stages.train.make_trainer, stages.train.adapter_model) == (trainer.make_trainer, lora.adapter_model)
    bench = Bench("tiny", tmp_path, updates=0)
    params = bench.params(train__max_steps=1, sequence__max_length=64, base_model__load_in_4bit=False)
    with Checkpoints(tmp_path / "bench") as checkpoints:
        bench.trainer(params, checkpoints).train()
    timed = set(seen)
    seen.clear()
    model = lora.adapter_model(params, bench.base(), torch.device("cpu"))
    trainer_of(params, model, tokenizer, bench.conversations(200, 64), [], tmp_path / "stage").train()
    assert timed == seen
    assert {("attention", torch.bfloat16), ("autocast", True), ("attention asked for", "varlen")} < timed


def test_a_section_that_was_cut_short_keeps_what_it_has_and_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "gpu.json"
    stopped = [True]

    def second() -> dict[str, Any]:
        if stopped[0]:
            raise KeyboardInterrupt
        return {"tflops": 2}

    monkeypatch.setattr(gpu, "SECTIONS", {"matrix_products": lambda _: iter([("first", lambda: {"tflops": 1}), ("second", second)])})
    bench = Bench("tiny", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_section("matrix_products", bench, results)
    (entry,) = gpu.read(results).values()
    assert (entry["sections"], entry.get("whole")) == ({"matrix_products": {"first": {"tflops": 1}}}, None)
    stopped[0] = False
    gpu.run_section("matrix_products", bench, results)
    (entry,) = gpu.read(results).values()
    assert (list(entry["sections"]["matrix_products"]), entry["whole"]) == (["first", "second"], ["matrix_products"])
