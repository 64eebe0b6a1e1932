"""What a run does not use is not imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora.runtime.imports import hide_unused_libraries

ROOT = Path(__file__).parents[2]
PROGRAM = """
from qlora.runtime.imports import hide_unused_libraries
hide_unused_libraries()
from peft.import_utils import is_bnb_available
from transformers.utils import is_bitsandbytes_available
print(is_bnb_available(), is_bitsandbytes_available())
"""


@pytest.mark.parametrize(
    ("old", "new", "hidden"),
    [
        ("", "", True),
        ("load_in_4bit: false", "load_in_4bit: true", False),
        ("load_in_8bit: false", "load_in_8bit: true", False),
        ("optim: adamw_torch", "optim: adamw_bnb_8bit", False),
    ],
)
def test_bitsandbytes_is_hidden_from_a_run_that_does_not_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, hidden: bool
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    # Another test of this process may have imported it: put back as it was.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    del sys.modules["bitsandbytes"]
    hide_unused_libraries(path)
    # None makes an import fail; without an entry it is found where it is installed.
    assert ("bitsandbytes" in sys.modules) == hidden
    assert sys.modules.get("bitsandbytes") is None


def test_to_the_libraries_what_is_hidden_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_scoring_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, stages.evaluate; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "set()"
