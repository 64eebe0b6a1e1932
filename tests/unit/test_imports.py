"""What a run does not use is not imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from qlora.runtime.imports import hide_unused_libraries
hide_unused_libraries(Path(sys.argv[1]))
from peft.import_utils import is_bnb_available
from transformers.utils import is_bitsandbytes_available
print(is_bnb_available(), is_bitsandbytes_available())
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", "False False"),
        ("load_in_4bit: false", "load_in_4bit: true", "True True"),
        ("optim: adamw_torch", "optim: adamw_bnb_8bit", "True True"),
    ],
)
def test_bitsandbytes_is_hidden_from_a_run_that_does_not_use_it(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_scoring_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, stages.evaluate; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "set()"
