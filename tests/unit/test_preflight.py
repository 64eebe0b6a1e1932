"""A machine that is not able is told so before anything long begins, and what would help."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.core.errors import MachineError
from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training import memory, preflight
from qlora.training.checkpoints import Checkpoints
from qlora.training.tokenization import Example
from qlora.training.trainer import make_trainer
from tests.unit.trainings import adapted, changed
from tools import preflight as tool


@pytest.fixture
def recipe() -> Params:
    return tool.of_recipe("llama3-8b-rtx4090")


@pytest.fixture
def shape() -> Any:
    return tool.shape_of("llama3-8b-instruct")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one than is here: 24 GB, with bfloat16."""
    monkeypatch.setattr(preflight, "memory_bytes", lambda _: 24 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.mark.usefixtures("card")
def test_what_fits_is_let_through(recipe: Params, shape: Any) -> None:
    assert preflight.check_machine(recipe, shape).total < 11 * 2**30


@pytest.mark.usefixtures("card")
def test_what_does_not_fit_is_refused_with_what_each_change_saves(recipe: Params, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = changed(recipe, hardware__activation_checkpointing=False)
    # A quarter of its layers and of the card: every change that would help is estimated, each a pass over the whole model.
    shape.num_hidden_layers = 8
    monkeypatch.setattr(preflight, "memory_bytes", lambda _: 6 * 10**9)
    whole = preflight.estimate(params, shape)
    with pytest.raises(MachineError) as caught:
        preflight.check_machine(params, shape)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.startswith(f"[memory-short] this training needs about {whole.described()}, ")
    assert "there are 5.59 GiB." in text
    saved = [line.split()[:3] for line in text.splitlines()[1:]]
    assert [name for name, *_ in saved] == [
        "hardware.activation_checkpointing:",
        "sequence.max_length:",
        "hardware.per_device_train_batch_size:",
        "lora.lora_dropout:",
    ]
    # The change alone, estimated again.
    assert saved[0][1] == "true"
    assert saved[0][2] == f"-{(whole.total - preflight.estimate(recipe, shape).total) / 2**30:.2f}"


@pytest.mark.parametrize(
    ("changes", "advised"),
    [
        ({}, ["load_in_4bit", "load_in_8bit"]),
        ({"base_model__load_in_8bit": True}, ["load_in_4bit"]),
        ({"hardware__strategy": "fsdp2", "hardware__num_processes": 2}, ["load_in_4bit"]),
        ({"base_model__dtype": "float32", "lora__init_lora_weights": "pissa"}, []),
    ],
)
def test_quantisation_is_advised_where_params_allow_it(
    recipe: Params, shape: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], advised: list[str]
) -> None:
    def sizes(params: Params, _config: Any) -> memory.Estimate:
        base = params.base_model
        return memory.Estimate(25 if base.load_in_4bit else 50 if base.load_in_8bit else 100, 0, 0, 0, 0, 0, 0, 0.0)

    monkeypatch.setattr(preflight, "estimate", sizes)
    params = changed(recipe, base_model__load_in_4bit=False, **changes)
    found = preflight.advice(sizes(params, shape), params, shape)
    assert [line.partition(":")[0] for line in found] == [f"base_model.{name}" for name in advised]


def test_what_is_only_just_too_much_is_warned_of(recipe: Params, shape: Any, card: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # Of its 32 layers, so that the estimates of all that would help take no time.
    shape.num_hidden_layers = 2
    needed = preflight.estimate(recipe, shape)
    monkeypatch.setattr(preflight, "memory_bytes", lambda _: int(needed.total / 1.05))
    preflight.check_machine(recipe, shape)
    assert f"warning: it may not fit: this training needs about {needed.described()}" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "memory_bytes", lambda _: int(needed.total / 1.15))
    with pytest.raises(MachineError, match="memory-short"):
        preflight.check_machine(recipe, shape)


@pytest.mark.usefixtures("card")
def test_a_card_without_bfloat16_is_refused(recipe: Params, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(MachineError, match=r"\[bf16-missing\] base_model.dtype and base_model.bnb_4bit_compute_dtype = 'bfloat16', which Tesla T4"):
        preflight.check_machine(recipe, shape)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("kind", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")])
def test_attention_that_is_not_installed_is_refused(recipe: Params, shape: Any, kind: str, package: str) -> None:
    with pytest.raises(MachineError, match=rf"\[attention-missing\] .* = '{kind}': the package {package} is not installed"):
        preflight.check_machine(changed(recipe, base_model__attn_implementation=kind), shape)


def test_the_memory_of_this_machine_is_known_and_shared_by_its_processes(default_params: Params) -> None:
    alone = preflight.memory_bytes(default_params.hardware)
    assert 2**28 < alone < 2**50
    assert preflight.memory_bytes(changed(default_params, hardware__num_processes=2).hardware) == pytest.approx(alone / 2, rel=0.2)


def test_the_pass_over_the_longest_rows_changes_nothing(
    few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = changed(few_steps, lora__lora_dropout=0.3, train__neftune_noise_alpha=5.0, hardware__activation_checkpointing=True)

    def trained(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
        with Checkpoints(folder) as checkpoints:
            trainer = make_trainer(params, adapted(params), tokenizer, examples, examples[:5], checkpoints, Interruption())
            trainer.train()
        return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}, trainer

    with_it, trainer = trained(tmp_path / "with")
    longest = sorted(len(ids) for ids in trainer.train_dataset["input_ids"])[-2:]
    assert f"memory check, longest batch ({sum(longest)} tokens): " in capsys.readouterr().out
    monkeypatch.setattr(preflight.LongestPass, "on_train_begin", lambda *_, **__: None)
    without, other = trained(tmp_path / "without")
    assert all(torch.equal(with_it[name], weight) for name, weight in without.items())
    assert trainer.state.log_history[0]["num_tokens"] == other.state.log_history[0]["num_tokens"]
    assert trainer.state.log_history[0]["entropy"] == other.state.log_history[0]["entropy"]


def test_the_pass_is_made_over_what_a_training_holds(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    """Out of memory in it ends the training before its first update."""
    with Checkpoints(tmp_path) as checkpoints:
        trainer = make_trainer(few_steps, adapted(few_steps), tokenizer, examples, [], checkpoints, Interruption())

        def full(*_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.compute_loss = full
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    assert trainer.state.global_step == 0
