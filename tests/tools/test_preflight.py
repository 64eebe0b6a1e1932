import sys
from typing import Any

import pytest
import torch

from qlora.core.errors import InputError, MachineError
from qlora.params import Params
from qlora.training import preflight as estimated
from qlora.training.memory import Estimate
from tests.unit.trainings import changed
from tools import preflight


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight", *arguments])
    preflight.main()


def test_the_default_fits_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch)
    shown = capsys.readouterr().out
    assert shown.startswith("tiny: 2 row(s) of 256 tokens a pass")
    *_, total, answers, disk = shown.splitlines()
    assert total.split()[:1] == ["total"]
    assert answers.startswith("  baseline and predict: predict.batch_tokens up to ")
    assert disk.startswith("  on the disk up to ")


def test_a_recipe_for_a_gpu_is_shown_and_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no-gpu") as caught:
        run(monkeypatch, "--recipe", "llama3-8b-rtx4090")
    assert caught.value.exit_code == 3
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(("memory", "fits"), [("24", True), ("8", False)])
def test_another_cards_memory(memory: str, fits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # What each change would save is a pass of its own: tests/unit/test_preflight.py has them all.
    monkeypatch.setattr(estimated, "CHANGES", estimated.CHANGES[:1])
    if fits:
        run(monkeypatch, "--recipe", "llama3-8b-rtx4090", "--memory", memory)
    else:
        with pytest.raises(MachineError, match="memory-short"):
            run(monkeypatch, "--recipe", "llama3-8b-rtx4090", "--memory", memory)
    assert f"of {int(memory) * 1e9 / 2**30:.1f} GiB" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["0", "-5", "nan", "much"])
def test_no_amount_of_memory_is_refused(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, f"--memory={memory}")
    assert caught.value.code == 2


def test_a_model_of_unknown_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[base-model-missing\] base_model.name = 'nobody' is neither pinned"):
        preflight.shape_of("nobody")


def recipe(**changes: object) -> tuple[Params, Any]:
    values = changed(preflight.of_recipe("llama3-8b-rtx4090"), **changes)
    return values, preflight.shape_of(values.base_model.name)


def test_a_token_of_a_batch_takes_what_is_kept_and_what_a_layer_and_the_head_take_for_a_moment() -> None:
    values, config = recipe(predict__max_new_tokens=128_256)
    # Keys and values of 32 layers with 8 heads of 128 numbers in 16 bits.
    kept = 2 * 32 * 8 * 128 * 2
    # Keys and values for 32 heads, four hidden states and three tensors of the MLP, in 16 bits; a word of logits in 16 and in 32.
    moment = (2 * 32 * 128 + 4 * 4096 + 3 * 14336) * 2 + 2 + 4
    assert preflight.answer_bytes_per_token(values, config) == kept + moment
    assert preflight.answer_bytes_per_token(values, config, cards=4) == kept / 4 + moment


def test_the_budget_of_answers_grows_with_the_memory_beside_the_model() -> None:
    values, config = recipe()
    needed = Estimate(5 * 10**9, 10**8, 0, 0, 10**12, 0, 5 * 10**8, 0.0)
    found = [preflight.batch_tokens(values, config, needed, gigabytes * 10**9) for gigabytes in (5, 16, 24)]
    # What is kept for a backward pass does not count.
    per_token = preflight.answer_bytes_per_token(values, config)
    assert found == [int(0.8 * free / per_token) // 1024 * 1024 for free in (0, 10.4e9, 18.4e9)]
    assert preflight.recommendation(values, found[2]).endswith(f"up to {found[2]:,} should fit, by estimate; it is 16,384")
    assert preflight.recommendation(values, 9216).endswith("it is 16,384, too large")
    assert "no room for a batch of 1,024 tokens" in preflight.recommendation(values, found[0])
