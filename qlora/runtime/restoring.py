"""What DVC removed before a stage that refused its inputs, and the commands that restore it."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora.core.dvc_lock import Recorded, cached, flat, locked_stages, outputs_in_git, params_values, recorded, value_at
from qlora.core.errors import UserFacingError
from qlora.core.hashing import project_root
from qlora.core.text import in_shell
from qlora.runtime.git import committed, git

PARAMS = Path("params.yaml")


def advice() -> str:
    """Text after the message of a stage that DVC runs here; empty for one run by hand, or in a copy of the workspace for an experiment."""
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    if not stage or project_root() != Path.cwd():
        return ""
    try:
        gone = [entry for entry in recorded() if entry.stage == stage and entry.is_output and not Path(entry.path).exists()]
        steps = [*_params_back(stage), *_outputs_back(stage, gone)] if gone else []
    except (UserFacingError, OSError):
        # Of a dvc.lock or dvc.yaml that can't be read, the message is the stage's own.
        return ""
    if not steps:
        return ""
    return f"\nDVC removed the outputs of {stage} before it ran. This restores them:" + "".join(f"\n  {step}" for step in steps)


def _params_back(stage: str) -> list[str]:
    """How params.yaml comes to what the outputs were made with. A command where that is what HEAD has, else the values."""
    locked = flat(locked_stages()[stage].get("params", {}).get(str(PARAMS), {}))
    changed = bool(git("diff", "--name-only", "HEAD", "--", str(PARAMS)))
    before = _committed_params()
    if changed and all(value_at(before, place) == value for place, value in locked.items()):
        return [f"git stash push -- {PARAMS}   # keeps its changes: git stash pop"]
    try:
        now: Any = params_values()
    except UserFacingError:
        now = {}
    return [f"in {PARAMS}: {place}: {value!r}" for place, value in locked.items() if value_at(now, place) != value]


def _committed_params() -> Any:
    try:
        return YAML(typ="safe", pure=True).load(committed(PARAMS) or b"")
    except YAMLError:
        return None


def _outputs_back(stage: str, gone: list[Recorded]) -> list[str]:
    in_git = outputs_in_git()
    from_cache = [entry.path for entry in gone if entry.path not in in_git and cached(entry.md5).is_file()]
    from_git = [entry.path for entry in gone if entry.path in in_git and _committed_md5(entry.path) == entry.md5]
    found = []
    if from_cache:
        found.append(f"dvc checkout {' '.join(map(in_shell, from_cache))}")
    if from_git:
        found.append(f"git checkout HEAD -- {' '.join(map(in_shell, from_git))}")
    if len(from_cache) + len(from_git) < len(gone):
        found.append(f"dvc repro {in_shell(stage)}   # takes the others from DVC's run cache")
    return found


def _committed_md5(path: str) -> str | None:
    content = committed(Path(path))
    return None if content is None else hashlib.md5(content).hexdigest()
