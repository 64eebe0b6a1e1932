"""Seconds, rates and peak memory of a stage: written beside the metrics, an output of no stage.

Wall-clock numbers differ every run, so they must never reach a tracked file.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.core.files import update_json
from qlora.core.hashing import project_root

FILE = "throughput.json"


class Work:
    """Counts of what was done, named by their unit."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, **counts: int) -> None:
        self.counts.update(counts)


@contextmanager
def timed(stage: str, notes: Path, peak_memory_bytes: Callable[[], int]) -> Iterator[Work]:
    """Time the block and write it under `stage` to throughput.json in the folder `notes`; of several processes the main one alone does.

    `dvc exp run --temp` and `--queue` throw the working copy away: there the same file is also written under
    .dvc/tmp/throughput/ of the repository, by the name of the working copy.
    """
    work = Work()
    began = time.perf_counter()
    yield work
    if os.environ.get("RANK", "0") != "0":
        return
    seconds = time.perf_counter() - began
    rates = {f"{name}_per_second": round(count / seconds, 2) for name, count in work.counts.items()}
    entry = {"seconds": round(seconds, 2), "peak_memory_bytes": peak_memory_bytes(), **work.counts, **rates}
    update_json(notes / FILE, stage, entry)
    if project_root() != Path.cwd():
        update_json(project_root() / ".dvc" / "tmp" / "throughput" / f"{Path.cwd().name}.json", stage, entry)
