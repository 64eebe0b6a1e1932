"""Runs in the background, which tests interrupt."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.torture import processes
from tests.pipeline.clone import Clone


def started(clone: Clone, *command: str, **environment: str | None) -> "subprocess.Popen[bytes]":
    """The command in a group of its own; None takes a variable out of its environment."""
    wanted = {name: value for name, value in {**clone.environment, **environment}.items() if value is not None}
    with (clone.path.parent / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=clone.path, env=wanted, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def log(clone: Clone) -> str:
    return (clone.path.parent / "log").read_text(encoding="utf-8", errors="replace")


def wait_for(what: Any, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def checkpoint(clone: Clone) -> Any:
    return list((clone.path / ".dvc/tmp/checkpoints").glob("*/checkpoint-*"))


def ranks(folder: Path, words: str) -> list[int]:
    """The processes with these words in their command line that were launched as one of several, by rank."""
    found = {}
    for process in processes(folder, words):
        with suppress(FileNotFoundError, ProcessLookupError):
            variables = dict(line.split(b"=", 1) for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0") if b"=" in line)
            if b"RANK" in variables:
                found[int(variables[b"RANK"])] = process
    return [found[rank] for rank in sorted(found)]
