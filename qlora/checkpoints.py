"""Checkpoints of an unfinished training, in a folder named by everything that made them.

Another parameter, data set, base model or line of code is another folder: a changed run never goes on from foreign state.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MARKER = "complete"


def fingerprint(values: Mapping[str, Any], files: Iterable[Path]) -> str:
    """16 hex digits over values and the content of files."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint of the highest step whose marker was written, which is the last act of a save."""
    complete = [marker.parent for marker in folder.glob(f"checkpoint-*/{MARKER}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class MarkComplete(TrainerCallback):
    """Writes the marker once a checkpoint stands whole."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / MARKER).touch()
