import sys

import pytest
import torch

from qlora.core.errors import InputError, MachineError
from qlora.training import preflight as estimated
from tools import preflight


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["preflight", *arguments])
    preflight.main()


def test_the_default_fits_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch)
    shown = capsys.readouterr().out
    assert shown.startswith("tiny: 2 row(s) of 256 tokens a pass")
    *_, total, disk = shown.splitlines()
    assert total.split()[:1] == ["total"]
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
