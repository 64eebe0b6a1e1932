"""Real clones in which the real dvc runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from tools.recipes import compose

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
    "HF_HUB_OFFLINE": "1",
    # Threads that wait leave the core to the tests beside them.
    "GOMP_SPINCOUNT": "0",
}
TRIED = "dvc exp run -S train.learning_rate=2e-5"
"""The experiment that was run in the clones of the fixture `tried`."""


@dataclass
class Clone:
    """A checkout of the project, with the working tree's code and a repository of its own."""

    path: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))

    def run(self, *command: str, fails: bool = False, **environment: str) -> str:
        """Both streams of a command's output; a wrong exit status shows them."""
        done = subprocess.run(
            command, cwd=self.path, env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert (done.returncode != 0) == fails, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def repro(self, *arguments: str, **environment: str) -> set[str]:
        """The stages that `dvc repro` ran."""
        return ran(self.run("dvc", "repro", *arguments, **environment))

    def changed(self) -> dict[str, set[str]]:
        """The stages that `dvc status` calls changed, each with its changed dependencies; what runs after them it can't know."""
        status: dict[str, list[dict[str, dict[str, str]]]] = json.loads(self.run("dvc", "status", "--json"))
        return {stage: {dep for entry in entries for dep in entry.get("changed deps", {})} for stage, entries in status.items()}

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)

    def set(self, **values: object) -> None:
        """Values of params.yaml, as section__key=value."""
        overlay: dict[str, dict[str, object]] = {}
        for name, value in values.items():
            section, _, key = name.partition("__")
            overlay.setdefault(section, {})[key] = value
        path = self.path / "overlay.yaml"
        path.write_text(json.dumps(overlay), encoding="utf-8")
        (self.path / "params.yaml").write_text(compose(self.path / "params.yaml", path), encoding="utf-8")
        path.unlink()

    def json(self, name: str) -> dict[str, object]:
        record: dict[str, object] = json.loads((self.path / name).read_text(encoding="utf-8"))
        return record

    def outputs(self) -> dict[str, bytes]:
        """Every tracked output by path: its bytes. What says who made them is none: a killed copy of the workspace takes its note along."""
        tops = ("data/prepared", "data/predictions", "models/adapter", "metrics", "reports")
        found = (path for top in tops for path in (self.path / top).rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in found
            if path.name not in ("throughput.json", "environment.json", ".gitignore")
        }


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(\w+)'", output))


def new_clone(path: Path, overlay: Path | None, raw: Mapping[str, Sequence[Mapping[str, object]]]) -> Clone:
    """The working tree's tracked and new files, committed as a repository of their own.

    Args:
        overlay: Recipe written into its params.yaml.
        raw: Rows by the .jsonl file that shall hold them.
    """
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    clone = Clone(path)
    if overlay:
        (path / "params.yaml").write_text(compose(path / "params.yaml", overlay), encoding="utf-8")
    clone.run("git", "init", "--quiet", "--initial-branch", "main")
    for name, rows in raw.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        clone.run("git", "add", "--force", name)
    clone.commit("as it is")
    return clone


def tiny_rows(split: str, count: int) -> list[dict[str, object]]:
    table = pq.read_table(ROOT / "data" / "raw" / "tiny" / f"{split}-00000-of-00001.parquet", columns=["messages", "category"])
    rows: list[dict[str, object]] = table.slice(0, count).to_pylist()
    return rows
