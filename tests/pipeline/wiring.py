"""What dvc.yaml lists for each stage."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
NOBODYS = ("qlora/runtime", "qlora/delivery", "tools")
"""Can't change a byte of an output, see test_runtime.py, or are run by no stage."""


def is_within(path: str, places: tuple[str, ...] | list[str]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


def code_listed(stage: str) -> list[str]:
    """The stage's dependencies in this repository's code, files and folders."""
    return [dep for dep in STAGES[stage]["deps"] if is_within(dep, ["qlora", "stages", "tools", "benchmarks", "tests"])]


def outputs(stage: str) -> list[str]:
    return [out if isinstance(out, str) else next(iter(out)) for kind in ("outs", "metrics", "plots") for out in STAGES[stage].get(kind, [])]
