"""Trainings on a GPU: what they take is what was estimated, twice the same bytes, and resumed the same."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from qlora.model import loading
from qlora.model.device import set_up_device
from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.checkpoints import Checkpoints
from qlora.training.lora import lora_config
from qlora.training.memory import CONTEXT_BYTES, estimate
from qlora.training.tokenization import Example
from qlora.training.trainer import make_trainer
from tests.unit.trainings import TINY, changed
from tools import preflight

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
"""An eighth of Llama-3-8B with its vocabulary."""
TOKENS = 3072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16).save_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def settings() -> Params:
    return changed(
        preflight.of_recipe("llama3-8b-rtx4090"),
        train__max_steps=4,
        train__eval_strategy="no",
        train__deterministic=True,
        sequence__max_length=TOKENS,
        runtime__progress=False,
        runtime__save_steps=2,
    )


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (16, TOKENS), generator=generator).tolist()
    return [Example(ids=row, labels=row, conversation=str(number)) for number, row in enumerate(ids)]


def trained(params: Params, folder: Path, checkpoints_folder: Path, *, resume: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    """Adapter weights, and the most bytes that torch's tensors took."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = set_up_device(params.hardware, deterministic=params.train.deterministic)
    base = loading.load_model(params.base_model, folder, device, progress=False)
    set_seed(params.train.seed)
    model = get_peft_model(base, lora_config(params.lora, base))
    with Checkpoints(checkpoints_folder) as checkpoints:
        trainer = make_trainer(params, model, loading.load_tokenizer(folder), rows(), [], checkpoints, Interruption())
        newest = checkpoints.newest() if resume else None
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    weights = {name: weight.detach().cpu().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return weights, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(("four_bit", "checkpointing"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_memory_is_that_of_the_estimate(settings: Params, folder: Path, tmp_path: Path, four_bit: bool, checkpointing: bool) -> None:
    params = changed(settings, base_model__load_in_4bit=four_bit, hardware__activation_checkpointing=checkpointing)
    needed = estimate(params, loading.load_config(folder)).total - CONTEXT_BYTES
    taken = trained(params, folder, tmp_path)[1]
    print(f"4-bit {four_bit}, checkpointing {checkpointing}: {taken / 2**30:.2f} GiB taken, {needed / 2**30:.2f} estimated ({needed / taken:.3f})")
    assert needed == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_it_is_twice_the_same_and_resumed_the_same(settings: Params, folder: Path, tmp_path: Path, optim: str) -> None:
    params = changed(settings, train__optim=optim)
    first, _ = trained(params, folder, tmp_path / "first")
    again, _ = trained(params, folder, tmp_path / "again")
    # From the checkpoint after update 2, which the first run left.
    resumed, _ = trained(params, folder, tmp_path / "first", resume=True)
    assert all(torch.equal(first[name], weight) for name, weight in again.items())
    assert all(torch.equal(first[name], weight) for name, weight in resumed.items())
