"""A base model whose layers two processes share trains the adapter that whole ones do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from qlora import hardware
from qlora.checkpoints import Checkpoints
from qlora.encoding import Example
from qlora.errors import InputError
from qlora.interruption import Interruption
from qlora.params import Params
from qlora.sharding import share_layers
from qlora.trainer import make_trainer
from tests.unit.ranks_of_a_test import in_two_processes
from tests.unit.trainings import adapted, changed


def work(rank: int, params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> None:
    hardware.set_up(params.hardware, deterministic=True, processes=2)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        model = adapted(params)
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        held = sum(weight.to_local().nbytes if isinstance(weight, DTensor) else weight.nbytes for weight in frozen)
        trainer = make_trainer(params, model, tokenizer, examples, examples[:7], checkpoints, Interruption())
        resumed = checkpoints.newest()
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    torch.save({"weights": weights, "losses": trainer.losses(), "validation": trainer.validation_losses(), "held": held}, folder / str(rank))


def by_two(params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    in_two_processes(work, params, examples, tokenizer, folder)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.fixture
def settings(few_steps: Params) -> Params:
    return changed(
        few_steps,
        train__max_steps=6,
        train__batch_size=4,
        train__learning_rate=2e-4,
        train__eval_strategy="epoch",
        train__num_train_epochs=9.0,
        sequence__max_length=64,
        hardware__num_processes=2,
        hardware__per_device_train_batch_size=1,
        hardware__num_threads=1,
        runtime__save_steps=3,
    )


def test_a_model_that_names_no_layers_is_refused(few_steps: Params) -> None:
    model = adapted(few_steps)
    model.get_base_model()._no_split_modules = None
    with pytest.raises(InputError, match=r"\[base-model-layers\] LlamaForCausalLM does not say what its layers are"):
        share_layers(model, torch.device("cpu"), offload=False)


@pytest.mark.parametrize("kind", ["float32", "4-bit", "checkpointing and DoRA"])
def test_shared_layers_train_what_whole_ones_do(settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, kind: str) -> None:
    if kind == "4-bit":
        settings = changed(settings, base_model__load_in_4bit=True, base_model__bnb_4bit_quant_storage="float32")
    if kind == "checkpointing and DoRA":
        settings = changed(settings, hardware__activation_checkpointing=True, lora__use_dora=True, train__keep="best")
    whole = by_two(settings, examples, tokenizer, tmp_path / "whole")
    shared = by_two(changed(settings, hardware__strategy="fsdp2"), examples, tokenizer, tmp_path / "shared")
    assert shared[0]["held"] < 0.51 * whole[0]["held"]
    assert all(torch.equal(shared[0]["weights"][name], shared[1]["weights"][name]) for name in shared[0]["weights"])
    difference = max(float((shared[0]["weights"][name] - weight).abs().max()) for name, weight in whole[0]["weights"].items())
    print(f"{kind}: largest difference of a weight: {difference:.1e}")
    assert difference <= 1e-6
    for curve in ("losses", "validation"):
        assert [loss for _, loss in shared[0][curve]] == pytest.approx([loss for _, loss in whole[0][curve]], rel=1e-6)
    if kind == "float32":
        # From the checkpoint after update 3, which the first run left.
        resumed = by_two(changed(settings, hardware__strategy="fsdp2"), examples, tokenizer, tmp_path / "shared")
        assert all(torch.equal(resumed[0]["weights"][name], weight) for name, weight in shared[0]["weights"].items())
        assert resumed[0]["losses"] == shared[0]["losses"]
