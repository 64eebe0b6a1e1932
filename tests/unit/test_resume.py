"""A training that was stopped and goes on ends in the same bytes as one that never was."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.checkpoints import Checkpoints
from qlora.training.tokenization import Example
from qlora.training.trainer import ExactTrainer, make_trainer
from tests.unit.trainings import adapted, assert_same, changed, results, run

STEPS = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"base_model__dtype": "bfloat16"},
    "4-bit": {"base_model__load_in_4bit": True, "base_model__bnb_4bit_compute_dtype": "bfloat16", "base_model__dtype": "bfloat16"},
    "LLM.int8()": {"base_model__load_in_8bit": True, "base_model__dtype": "bfloat16", "hardware__activation_checkpointing": True},
    "unpacked, accumulated": {"sequence__packing": "none", "train__batch_size": 6},
    "activation checkpointing": {"hardware__activation_checkpointing": True},
    "fused": {"train__optim": "adamw_torch_fused"},
    "8-bit optimizer, LoRA+": {"train__optim": "adamw_bnb_8bit", "train__loraplus_lr_ratio": 4.0},
    "a layer trained in full": {"lora__modules_to_save": ["lm_head"]},
    "PiSSA, rsLoRA": {"lora__init_lora_weights": "pissa", "lora__use_rslora": True},
    "OLoRA, DoRA": {"lora__init_lora_weights": "olora", "lora__use_dora": True},
    "polynomial": {"train__lr_scheduler_type": "polynomial", "train__warmup_steps": 2},
    "inverse_sqrt": {"train__lr_scheduler_type": "inverse_sqrt", "train__warmup_steps": 2},
    "noise on the embeddings": {"train__neftune_noise_alpha": 5.0},
    "the best kept": {"train__eval_strategy": "steps", "train__eval_steps": 1, "train__keep": "best", "train__learning_rate": 0.05},
    "validation every 2": {"train__eval_strategy": "steps", "train__eval_steps": 2},
}


@pytest.fixture
def settings(few_steps: Params) -> Params:
    return changed(
        few_steps,
        train__max_steps=STEPS,
        train__num_train_epochs=50.0,
        train__batch_size=4,
        lora__lora_dropout=0.1,
        hardware__per_device_train_batch_size=2,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_at_any_update_it_goes_on_to_the_same_bytes(
    settings: Params,
    examples: list[Example],
    tokenizer: Any,
    tmp_path: Path,
    name: str,
) -> None:
    params = changed(settings, **SETTINGS[name])
    expected = results(run(params, examples, tokenizer, tmp_path / "whole"))
    assert len(expected[1]) == STEPS
    for stop in (1, 2, 4) if name == "float32" else (3,):
        folder = tmp_path / f"stopped-{stop}"
        stopped = run(params, examples, tokenizer, folder, stop)
        assert stopped.stopped
        assert stopped.state.global_step == stop
        again = run(params, examples, tokenizer, folder)
        assert again.done_this_time()["steps"] == STEPS - stop
        assert_same(again, expected)


def test_an_update_at_the_end_of_an_epoch_waits_for_its_validation(
    settings: Params,
    examples: list[Example],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    params = changed(settings, train__max_steps=None, train__num_train_epochs=3.0, runtime__save_steps=1, runtime__save_minutes=None)
    whole = run(params, examples, tokenizer, tmp_path / "whole")
    per_epoch = whole.state.max_steps // 3
    assert [step for step, _ in whole.validation_losses()] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    for validating in (False, True):
        folder = tmp_path / f"stopped-{validating}"
        stopped = run(params, examples, tokenizer, folder, 2 * per_epoch, validating=validating)
        assert stopped.stopped
        assert [step for step, _ in stopped.validation_losses()] == [per_epoch, 2 * per_epoch]
        assert_same(run(params, examples, tokenizer, folder), results(whole))


def test_a_signal_in_the_last_update_lets_it_end(settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    trainer = run(settings, examples, tokenizer, tmp_path, STEPS)
    assert not trainer.stopped
    assert trainer.state.global_step == STEPS


def test_a_signal_while_a_checkpoint_is_written_spoils_neither_it_nor_the_result(
    settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = changed(settings, runtime__save_steps=3)
    expected = results(run(params, examples, tokenizer, tmp_path / "whole"))
    save = ExactTrainer._save

    def signalled(trainer: Any, *args: Any, **kwargs: Any) -> None:
        save(trainer, *args, **kwargs)
        if trainer.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, Interruption() as interruption, Checkpoints(tmp_path / "stopped") as checkpoints:
        patched.setattr(ExactTrainer, "_save", signalled)
        interruption.can_wait = True
        trainer = make_trainer(params, adapted(params), tokenizer, examples, examples[:7], checkpoints, interruption)
        trainer.train()
        assert trainer.stopped
        assert sorted(path.name for path in checkpoints.folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
        # The one that was being written is as whole as the one after it.
        shutil.rmtree(checkpoints.folder / "checkpoint-4")
    again = run(params, examples, tokenizer, tmp_path / "stopped")
    assert again.done_this_time()["steps"] == STEPS - 3
    assert_same(again, expected)


def test_when_checkpoints_are_written_changes_nothing(
    settings: Params,
    examples: list[Example],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    whole = results(run(settings, examples, tokenizer, tmp_path / "none"))
    every = run(changed(settings, runtime__save_steps=1), examples, tokenizer, tmp_path / "every")
    assert_same(every, whole)
    assert sorted(path.name for path in (tmp_path / "every").glob("checkpoint-*")) == [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS - 1}"]
    timed = run(changed(settings, runtime__save_minutes=1e-9), examples, tokenizer, tmp_path / "timed")
    assert_same(timed, whole)
    assert (tmp_path / "timed" / f"checkpoint-{STEPS - 1}").is_dir()


def test_a_checkpoint_holds_no_pickled_arguments(settings: Params, examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    """They hold a hub token in clear."""
    run(settings, examples, tokenizer, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "lock"]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    expected = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "sums.json",
    }
    assert expected <= names <= expected | {"README.md"}


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but one byte": lambda content: content[:-1],
    "one byte flipped": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :],
}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    settings: Params,
    examples: list[Example],
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every file, damaged in every way; from the older checkpoint the same bytes come out."""
    params = changed(settings, runtime__save_steps=1)
    run(params, examples, tokenizer, tmp_path / "stopped", 4)
    newest = tmp_path / "stopped" / "checkpoint-4"
    contents = {path.name: path.read_bytes() for path in newest.iterdir()}
    older = {path.name: path.read_bytes() for path in (tmp_path / "stopped" / "checkpoint-3").iterdir()}
    checkpoints = Checkpoints(tmp_path / "stopped")
    assert checkpoints.newest() == newest
    for name in contents:
        for damage in DAMAGES.values():
            newest.mkdir(exist_ok=True)
            for file, content in contents.items():
                (newest / file).write_bytes(damage(content) if file == name else content)
            if (newest / name).read_bytes() == contents[name]:
                continue
            assert checkpoints.newest() == tmp_path / "stopped" / "checkpoint-3", (name, damage)
            assert not newest.exists()
    assert "checkpoint-4 can't be resumed from (not as it was written: optimizer.pt)" in capsys.readouterr().err
    assert older == {path.name: path.read_bytes() for path in (tmp_path / "stopped" / "checkpoint-3").iterdir()}
    again = run(params, examples, tokenizer, tmp_path / "stopped")
    assert again.done_this_time()["steps"] == STEPS - 3
    assert_same(again, results(run(params, examples, tokenizer, tmp_path / "whole")))
