import subprocess
import sys

import pytest

from qlora.errors import InputError
from tools import preflight


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "tools.preflight", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_default_fits_here() -> None:
    status, shown, errors = run()
    assert (status, errors) == (0, "")
    assert shown.startswith("tiny: 2 row(s) of 256 tokens a pass")
    *_, total, disk = shown.splitlines()
    assert total.split()[:1] == ["total"]
    assert disk.startswith("  on the disk up to ")


def test_a_recipe_for_a_gpu_is_shown_and_refused_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, shown, errors = run("--recipe", "llama3-8b-rtx4090")
    assert status == 3
    assert "total" in shown
    assert "[no-gpu]" in errors


@pytest.mark.parametrize(("memory", "expected"), [("24", 0), ("8", 3)])
def test_another_cards_memory(memory: str, expected: int) -> None:
    status, shown, errors = run("--recipe", "llama3-8b-rtx4090", "--memory", memory)
    assert status == expected
    assert f"of {int(memory) * 1e9 / 2**30:.1f}" in shown
    assert ("[memory-short]" in errors) == (expected == 3)


def test_a_model_of_unknown_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[base-model-missing\] base_model.name = 'nobody' is neither pinned"):
        preflight.shape_of("nobody")
