"""What metrics/environment.json says of the machine that made the outputs."""

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qlora.runtime.provenance import describe, record_environment

ROOT = Path(__file__).parents[2]


def test_stages_are_noted_side_by_side_and_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    record_environment(tmp_path, "prepare")
    record_environment(tmp_path, "train", torch.device("cpu"))
    first = path.read_bytes()
    record = json.loads(first)
    assert record["prepare"].items() <= record["train"].items()
    assert record["train"]["threads"] == torch.get_num_threads()
    assert record["train"]["device"] == "cpu"
    record_environment(tmp_path, "prepare")
    assert path.read_bytes() == first


def test_another_package_changes_the_digest(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("tqdm==1\nPyYAML==2\n", encoding="utf-8")
    lines = sorted([f"tqdm=={metadata.version('tqdm')}", f"PyYAML=={metadata.version('PyYAML')}"])
    assert describe(requirements=requirements)["packages"] == {"count": 2, "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has no instruction set to hide")
def test_what_changes_bytes_is_seen() -> None:
    """A hidden instruction set, a switch of exactness, and threads."""
    code = """
import json, torch
from qlora.runtime.provenance import describe
torch.set_num_threads(3)
torch.use_deterministic_algorithms(True)
print(json.dumps(describe(torch.device("cpu"))))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    found = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found["instruction_set"] == "DEFAULT" != describe(torch.device("cpu"))["instruction_set"]
    assert found["threads"] == 3
    assert found["determinism"]["deterministic_algorithms"]
    assert found["determinism"]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
