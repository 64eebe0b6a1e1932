"""A base model whose layers two processes share trains the adapter that whole ones do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from qlora.core.errors import InputError
from qlora.model.device import set_up_device
from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.checkpoints import Checkpoints
from qlora.training.fsdp import shard_layers
from qlora.training.tokenization import Example
from qlora.training.trainer import make_trainer
from tests.unit.trainings import adapted, changed
from tests.unit.two_processes import in_two_processes


def trained(params: Params, examples: list[Example], tokenizer: Any, folder: Path) -> dict[str, Any]:
    with Checkpoints(folder) as checkpoints:
        model = adapted(params)
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        held = sum(weight.to_local().nbytes if isinstance(weight, DTensor) else weight.nbytes for weight in frozen)
        trainer = make_trainer(params, model, tokenizer, examples, examples[:7], checkpoints, Interruption())
        resumed = checkpoints.newest()
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {"weights": weights, "losses": trainer.losses(), "validation": trainer.validation_losses(), "held": held}


def work(rank: int, kinds: dict[str, Params], examples: list[Example], tokenizer: Any, folder: Path) -> None:
    """Every kind of training, one after another: with whole layers, with shared ones, and those from the checkpoint that they left."""
    found = {}
    for kind, params in kinds.items():
        set_up_device(params.hardware, deterministic=True, processes=2)
        shared = changed(params, hardware__strategy="fsdp2")
        for name, asked, place in (("whole", params, "whole"), ("shared", shared, "shared"), ("resumed", shared, "shared")):
            found[kind, name] = trained(asked, examples, tokenizer, folder / kind / place)
    torch.save(found, folder / str(rank))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_shared_layers_train_what_whole_ones_do(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    settings = changed(
        few_steps,
        train__max_steps=4,
        train__batch_size=4,
        train__learning_rate=2e-4,
        train__eval_strategy="epoch",
        train__num_train_epochs=9.0,
        sequence__max_length=64,
        hardware__num_processes=2,
        hardware__per_device_train_batch_size=1,
        hardware__num_threads=1,
        runtime__save_steps=2,
    )
    kinds = {
        "float32": settings,
        "4-bit": changed(settings, base_model__load_in_4bit=True, base_model__bnb_4bit_quant_storage="float32"),
        "DoRA, PiSSA, LoRA+, checkpointing": changed(
            settings,
            hardware__activation_checkpointing=True,
            lora__use_dora=True,
            lora__init_lora_weights="pissa",
            train__loraplus_lr_ratio=4.0,
            train__keep="best",
        ),
    }
    in_two_processes(work, kinds, examples, tokenizer, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for kind in kinds:
        whole, shared, resumed = (first[kind, name] for name in ("whole", "shared", "resumed"))
        assert len(whole["losses"]) == 4
        assert whole["validation"], "an epoch ended"
        # Of the default's weights; its scales in 4 bits are no weights.
        assert shared["held"] < 0.51 * whole["held"], kind
        for other in (shared, second[kind, "shared"], resumed):
            assert same(other["weights"], whole["weights"]), kind
            assert other["losses"] == whole["losses"], kind
            assert other["validation"] == whole["validation"], kind


def test_a_model_that_names_no_layers_is_refused(few_steps: Params) -> None:
    model = adapted(few_steps)
    model.get_base_model()._no_split_modules = None
    with pytest.raises(InputError, match=r"\[base-model-layers\] LlamaForCausalLM does not say what its layers are"):
        shard_layers(model, torch.device("cpu"), offload=False)
