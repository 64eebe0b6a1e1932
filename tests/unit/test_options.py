"""Kinds of adapters, where a training begins, when it ends and what it keeps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.core.errors import InputError
from qlora.core.hashing import sha256_of
from qlora.model import adapter
from qlora.model.loading import load_model
from qlora.params import Params
from qlora.training.lora import load_init_adapter
from qlora.training.tokenization import Example
from qlora.training.trainer import ExactTrainer
from tests.unit.trainings import TINY, adapted, assert_same, changed, results, run


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.5, 12: 1.75, 14: 1.5}
"""Validation losses by update, as if they were measured: real ones of a few updates rise on one machine and not on another."""


@pytest.fixture
def measured(few_steps: Params, monkeypatch: pytest.MonkeyPatch) -> Params:
    loop = ExactTrainer.evaluation_loop

    def scripted(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        output = loop(trainer, *args, **kwargs)
        output.metrics["eval_loss"] = LOSSES[trainer.state.global_step]
        return output

    monkeypatch.setattr(ExactTrainer, "evaluation_loop", scripted)
    return changed(
        few_steps,
        train__max_steps=14,
        train__num_train_epochs=50.0,
        train__lr_scheduler_type="constant",
        train__eval_strategy="steps",
        train__eval_steps=2,
    )


@pytest.mark.parametrize(("patience", "ended", "best"), [(None, 14, 10), (1, 6, 4), (2, 8, 4), (3, 14, 10)])
def test_it_ends_when_the_validation_loss_no_longer_falls_and_keeps_the_best(
    measured: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, patience: int | None, ended: int, best: int
) -> None:
    """The first of equal losses is the best; a loss that only equals it is no lower one."""
    stopping = changed(measured, train__early_stopping_patience=patience, train__keep="best", runtime__save_steps=1)
    stopped = run(stopping, examples, tokenizer, tmp_path / "stopped")
    assert stopped.state.global_step == ended
    assert stopped.published_step() == best
    # Nothing goes on from the end.
    assert not (tmp_path / "stopped" / f"checkpoint-{ended}").exists()

    shorter = run(changed(measured, train__max_steps=best), examples, tokenizer, tmp_path / "shorter")
    assert shorter.published_step() == best
    kept, there = weights_of(stopped.model), weights_of(shorter.model)
    assert all(torch.equal(kept[name], there[name]) for name in kept)

    again = run(stopping, examples, tokenizer, tmp_path / "again", stop=best + 1)
    assert again.stopped
    assert_same(run(stopping, examples, tokenizer, tmp_path / "again"), results(stopped))


def test_the_last_is_kept_where_nothing_was_measured(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    params = changed(few_steps, train__eval_strategy="steps", train__eval_steps=1000, train__keep="best", train__early_stopping_patience=1)
    trainer = run(params, examples, tokenizer, tmp_path)
    assert trainer.published_step() == trainer.state.global_step == 3


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
    load_init_adapter(again, begun.lora)
    expected, found = weights_of(model), weights_of(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    def refused(**values: Any) -> str:
        wrong = changed(begun, **values)
        with pytest.raises(InputError, match=r"\[init-adapter\]") as error:
            load_init_adapter(adapted(wrong), wrong.lora)
        return error.value.message

    assert "is not a folder with adapter_model.safetensors" in refused(lora__init_adapter=str(tmp_path / "no"))
    assert "has the sha256" in refused(lora__init_adapter_sha256="0" * 64)
    assert "lora.r is 16 there and 8 here" in refused(lora__r=8)
    assert "adapts other layers" in refused(lora__target_modules=["q_proj"])
    (folder / adapter.CONFIG).write_text("{", encoding="utf-8")
    assert "can't be put on this base model" in refused()
    shutil.rmtree(folder)


def test_without_one_nothing_is_changed(few_steps: Params) -> None:
    model = adapted(few_steps)
    before = weights_of(model)
    load_init_adapter(model, few_steps.lora)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())


def test_loraplus_multiplies_the_learning_rate_of_b_alone(few_steps: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    """The first update of AdamW is the learning rate by the sign of each gradient, and B begins as 0; decay moves A, and DoRA has magnitudes."""
    once = changed(few_steps, train__max_steps=1, train__lr_scheduler_type="constant", train__weight_decay=0.1, lora__use_dora=True)
    started = weights_of(adapted(once))

    def moved(ratio: float | None) -> dict[str, torch.Tensor]:
        trainer = run(changed(once, train__loraplus_lr_ratio=ratio), examples, tokenizer, tmp_path / str(ratio))
        assert trainer.optimizer.param_groups[0]["lr"] == once.train.learning_rate
        return {name: weight - started[name] for name, weight in weights_of(trainer.model).items()}

    plain, same, raised = moved(None), moved(1.0), moved(4.0)
    assert {name.rsplit("lora_")[1].split(".")[0] for name, change in plain.items() if change.any()} == {"A", "B", "magnitude_vector"}
    for name, change in plain.items():
        assert torch.equal(same[name], change), name
        assert torch.equal(raised[name], 4 * change if "lora_B" in name else change), name


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(20, 60)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize(("init", "options"), [("pissa", {"lora__use_rslora": True}), ("olora", {"lora__use_dora": True})])
def test_an_adapter_that_began_as_a_part_of_the_base_is_published_for_all_of_it(
    few_steps: Params, examples: list[Example], tokenizer: Any, template: Any, tmp_path: Path, init: str, options: dict[str, Any]
) -> None:
    params = changed(few_steps, lora__init_lora_weights=init, **options)
    trained = run(params, examples, tokenizer, tmp_path / "run").model
    adapter.publish(trained, template, tmp_path / "adapter", "tiny")
    pinned = load_model(params.base_model, TINY, torch.device("cpu"), progress=False)
    before = logits(pinned)
    # A model that has not moved yet is the pinned one.
    torch.testing.assert_close(logits(adapted(params)), before, rtol=0, atol=1e-3)
    published = adapter.load_adapter(pinned, tmp_path / "adapter", "tiny")
    config = published.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (2 * params.lora.r, True)
    assert (logits(trained) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(published), logits(trained), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora__target_modules": ["q_proj", "lm_head"]}, "lm_head is an embedding or shares its matrix"),
        ({"lora__r": 65}, "lora.r = 65 is above the rank of"),
    ],
)
def test_first_weights_that_are_no_part_of_the_adapted_ones_are_refused(few_steps: Params, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"\[init-lora-weights\] .*{said}"):
        adapted(changed(few_steps, lora__init_lora_weights="olora", **options))
