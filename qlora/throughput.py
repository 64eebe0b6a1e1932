"""Seconds, rates and peak memory of a stage: written beside the metrics, an output of no stage.

Wall-clock numbers differ every run, so they must never reach a tracked file.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora.hardware import peak_memory_bytes
from qlora.manifest import project_root
from qlora.ranks import is_first
from qlora.records import note


class Work:
    """Counts of what was done, named by their unit."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, **counts: int) -> None:
        self.counts.update(counts)


@contextmanager
def measured(stage: str, path: Path, device: torch.device) -> Iterator[Work]:
    """Time the block and note it under `stage` in the file, of several processes the first alone.

    `dvc exp run --temp` and `--queue` throw the working copy away: there the same file is also written under
    .dvc/tmp/throughput/ of the repository, by the name of the working copy.
    """
    work = Work()
    began = time.perf_counter()
    yield work
    if not is_first():
        return
    seconds = time.perf_counter() - began
    rates = {f"{name}_per_second": round(count / seconds, 2) for name, count in work.counts.items()}
    entry = {"seconds": round(seconds, 2), "peak_memory_bytes": peak_memory_bytes(device), **work.counts, **rates}
    note(path, stage, entry)
    if project_root() != Path.cwd():
        note(project_root() / ".dvc" / "tmp" / "throughput" / f"{Path.cwd().name}.json", stage, entry)
