"""What several test files share."""

import fcntl
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.params.chat import ChatParams
from tests.pipeline.clone import Clone


def chat_params(template: str = "model", on_control_tokens: Any = "error", **values: Any) -> ChatParams:
    """The section `chat`; values that are not given change nothing."""
    return ChatParams(template=template, on_control_tokens=on_control_tokens, **{"template_kwargs": {}, "max_unknown_share": 1.0, **values})


def only_row(template: Any, conversation: Any) -> Any:
    """The one row of tokens of a conversation all answers of which are learned together."""
    (row,) = template.encode(conversation).rows
    return row


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` filled, once for all processes of a test run; none of them may change it."""
    base = tmp_path_factory.getbasetemp()
    # Each process of xdist has a folder of its own in that of the run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, unfinished = shared / name, shared / f"{name}-unfinished"
    with (shared / f"{name}.lock").open("w", encoding="utf-8") as lock:
        # The system frees it when its process ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # Another process's attempt that failed.
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def verdicts(shown: str) -> dict[str, str]:
    """The verdict of each measure in a table of tools.compare."""
    lines = [line for line in shown.splitlines() if " to " in line]
    return {line.split()[0]: re.sub(r"^[01]\.\d+\s+", "", line.split(" to ")[1].split(maxsplit=1)[1]) for line in lines}


def flip(path: Path) -> None:
    """Change one byte, in place and with the times it had: DVC does not notice it."""
    before = path.stat()
    mode = before.st_mode
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def files_of(path: Path) -> list[Path]:
    """The files of a folder and of those in it; a file alone is its own."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def overlapping(log: Path) -> list[tuple[str, ...]]:
    """Pairs of lines of a log (begin, end, GPUs, ...), both in seconds, in which two processes had one GPU at the same time."""
    intervals = [tuple(text.split()) for text in log.read_text(encoding="utf-8").splitlines()]
    return [
        (*one, *other)
        for one, other in itertools.combinations(intervals, 2)
        if set(one[2].split(",")) & set(other[2].split(",")) and float(one[0]) < float(other[1]) and float(other[0]) < float(one[1])
    ]


def start_queue(clone: Clone, jobs: int) -> None:
    """Start this many workers of DVC's queue."""
    command = ["dvc", "queue", "start", "--jobs", str(jobs)]
    # A worker holds the streams that it is given until it ends.
    subprocess.run(command, cwd=clone.path, env=clone.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def queue_tasks(clone: Clone) -> list[str]:
    """The state of each task of the queue."""
    lines = clone.run("dvc", "queue", "status").splitlines()
    return [line.split()[-1] for line in lines if line.split()[-1:] and line.split()[-1] in ("Queued", "Running", "Success", "Failed")]


def ended_queue(clone: Clone, seconds: float = 600) -> list[str]:
    """The states in which all its tasks have ended."""
    deadline = time.monotonic() + seconds
    while {"Running", "Queued"} & set(states := queue_tasks(clone)):
        assert time.monotonic() < deadline, states
        time.sleep(1)
    return states
