"""Kinds of adapters, where a training begins, when it ends and what it keeps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import adapter
from qlora.encoding import Example
from qlora.errors import InputError
from qlora.init_adapter import begin_from
from qlora.manifest import sha256_of
from qlora.params import Params
from tests.unit.test_resume import assert_same, results, run
from tests.unit.trainings import adapted, changed


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def first_rise(losses: dict[int, float]) -> tuple[int, int]:
    """The first step at which the loss is no lower than before, and the step of the lowest before it."""
    best = min(losses)
    for step in sorted(losses)[1:]:
        if losses[step] >= losses[best]:
            return step, best
        best = step
    raise AssertionError(f"the validation loss never rises: {losses}")


@pytest.fixture
def rising(few_steps: Params) -> Params:
    """A validation loss that falls at first and rises soon."""
    return changed(
        few_steps,
        train__max_steps=14,
        train__num_train_epochs=50.0,
        train__learning_rate=0.05,
        train__lr_scheduler_type="constant",
        train__eval_strategy="steps",
        train__eval_steps=2,
        train__max_grad_norm=1000.0,
    )


def test_it_ends_when_the_validation_loss_no_longer_falls_and_keeps_the_best(
    rising: Params, examples: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    whole = run(rising, examples, tokenizer, tmp_path / "whole")
    losses = dict(whole.validation_losses())
    assert whole.published_step() == whole.state.global_step == 14
    ended, best = first_rise(losses)

    stopping = changed(rising, train__early_stopping_patience=1, train__keep="best", runtime__save_steps=1)
    stopped = run(stopping, examples, tokenizer, tmp_path / "stopped")
    assert stopped.state.global_step == ended < 14
    assert stopped.published_step() == best

    shorter = run(changed(rising, train__max_steps=best), examples, tokenizer, tmp_path / "shorter")
    kept, there = weights_of(stopped.model), weights_of(shorter.model)
    assert all(torch.equal(kept[name], there[name]) for name in kept)
    # Nothing goes on from the end.
    assert not (tmp_path / "stopped" / f"checkpoint-{ended}").exists()

    again = run(stopping, examples, tokenizer, tmp_path / "again", stop=ended - 1)
    assert again.stopped
    assert_same(run(stopping, examples, tokenizer, tmp_path / "again"), results(stopped))


@pytest.mark.parametrize("options", [{"lora__use_rslora": True}, {"lora__use_dora": True}, {"lora__modules_to_save": ["lm_head"]}])
def test_a_training_may_begin_from_an_adapter(few_steps: Params, template: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    params = changed(few_steps, **options)
    model = adapted(params)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.01 * torch.randn_like(weight)
    folder = tmp_path / "adapter"
    adapter.publish(model, template, folder, "tiny")
    begun = changed(params, lora__init_adapter=str(folder), lora__init_adapter_sha256=sha256_of(folder / adapter.WEIGHTS))
    again = adapted(begun)
    begin_from(again, begun.lora)
    expected, found = weights_of(model), weights_of(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    def refused(**values: Any) -> str:
        wrong = changed(begun, **values)
        with pytest.raises(InputError, match=r"\[init-adapter\]") as error:
            begin_from(adapted(wrong), wrong.lora)
        return error.value.message

    assert "is no folder with adapter_model.safetensors" in refused(lora__init_adapter=str(tmp_path / "no"))
    assert "has the sha256" in refused(lora__init_adapter_sha256="0" * 64)
    assert "lora.r is 16 there and 8 here" in refused(lora__r=8)
    assert "adapts other layers" in refused(lora__target_modules=["q_proj"])
    (folder / adapter.CONFIG).write_text("{", encoding="utf-8")
    assert "can't be put on this base model" in refused()
    shutil.rmtree(folder)


def test_without_one_nothing_is_changed(few_steps: Params) -> None:
    model = adapted(few_steps)
    before = weights_of(model)
    begin_from(model, few_steps.lora)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
