"""What DVC removed before a stage that refused its inputs, and the commands that restore it."""

import hashlib
import os
from pathlib import Path

from qlora.core.dvc_lock import cached, outputs_in_git, recorded
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
        commands = restoring(stage)
    except UserFacingError:
        # Of a dvc.lock or dvc.yaml that can't be read, the message is the stage's own.
        return ""
    if not commands:
        return ""
    listed = "".join(f"\n  {command}" for command in commands)
    return f"\nBefore it ran {stage}, DVC removed its outputs. Once params.yaml is as it was, these commands restore them:{listed}"


def restoring(stage: str) -> list[str]:
    """Commands for the shell that restore params.yaml and the stage's outputs as dvc.lock records them."""
    in_git = outputs_in_git()
    gone = [entry for entry in recorded() if entry.stage == stage and entry.is_output and not Path(entry.path).exists()]
    from_cache = [entry.path for entry in gone if entry.path not in in_git and cached(entry.md5).is_file()]
    from_git = [entry.path for entry in gone if entry.path in in_git and _md5(entry.path) == entry.md5]
    found = []
    if git("diff", "--name-only", "HEAD", "--", str(PARAMS)):
        found.append(f"git checkout HEAD -- {PARAMS}   # undoes all of its changes")
    if from_cache:
        found.append(f"dvc checkout {' '.join(map(in_shell, from_cache))}")
    if from_git:
        found.append(f"git checkout HEAD -- {' '.join(map(in_shell, from_git))}")
    return found


def _md5(path: str) -> str | None:
    content = committed(Path(path))
    return None if content is None else hashlib.md5(content).hexdigest()
