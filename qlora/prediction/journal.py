"""Likelihoods and answers of an unfinished run of `baseline` or `predict`: a rerun reads them and makes only the rest, to the same bytes.

Another param, test set, model, adapter, line of code or machine is another folder: a changed run never reads foreign answers.

    .dvc/tmp/answers/<fingerprint>/lock      held by the run
    .dvc/tmp/answers/<fingerprint>/0.jsonl   what rank 0 has finished: a line for each conversation scored and for each batch answered

Each line begins with the sha256 of its entry. A line that was cut off or damaged is dropped and its work is done again. The folder is removed once
the outputs are written.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qlora.core.files import atomic_writers
from qlora.model.distributed import broadcast, is_main_process, rank_and_size
from qlora.prediction.generation import Answer
from qlora.runtime.locks import try_lock

logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 5
"""How long a run waits for one that is just ending in the same folder."""


class Journal:
    """What this process has finished of a run; entered, also what an earlier run of the same had.

    Args:
        folder: Of the run, the same for all of its processes. None: nothing is kept beyond this process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.nlls: dict[int, list[tuple[float, float]]] = {}
        """Of each turn of a conversation in nats, as turn_nlls gives them, by the number of the conversation."""
        self.answers: dict[tuple[int, int], Answer] = {}
        """By the seed and the number of the prompt."""
        self.reused_answers = 0
        """Of an earlier run."""
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        if self.folder is not None:
            if is_main_process():
                self._lock = _locked(self.folder / "lock")
            if broadcast(self._lock is not None):
                self._resume(self.folder / f"{rank_and_size()[0]}.jsonl")
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.nlls or self.answers or self._kept_by_others()):
            self.remove()
        if self._file:
            self._file.close()
        if self._lock:
            self._lock.close()
        self._file = self._lock = None

    def _kept_by_others(self) -> bool:
        return self.folder is not None and any(path.stat().st_size for path in self.folder.glob("*.jsonl"))

    def add_nlls(self, number: int, nlls: Sequence[tuple[float, float]]) -> None:
        self._add({"number": number, "nlls": nlls})

    def add_answers(self, seed: int, answers: Mapping[int, Answer]) -> None:
        """Those of one batch, by the number of the prompt."""
        self._add({"seed": seed, "answers": [[number, one.text, one.stopped, one.tokens] for number, one in answers.items()]})

    def summary(self) -> str:
        rank, size = rank_and_size()
        return f"{len(self.nlls):,} likelihood(s) and {len(self.answers):,} answer(s)" + (f" of rank {rank}" if size > 1 else "")

    def remove(self) -> None:
        """The run has written its outputs; only the process that holds the lock removes."""
        if self.folder is not None and self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, entry: dict[str, Any]) -> None:
        self._know(entry)
        if self._file:
            try:
                self._file.write(_line(entry))
            except OSError as error:
                # The run itself needs none of it.
                logger.warning("%s can't be written (%s): what is finished from here on is lost if the run is interrupted", self._file.name, error)
                self._file.close()
                self._file = None

    def _know(self, entry: dict[str, Any]) -> None:
        if "nlls" in entry:
            self.nlls[entry["number"]] = [(nll, stop) for nll, stop in entry["nlls"]]
        else:
            self.answers |= {(entry["seed"], number): Answer(text, stopped, tokens) for number, text, stopped, tokens in entry["answers"]}

    def _resume(self, path: Path) -> None:
        """Read what is whole, and go on writing after it."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        entries = list(_entries(lines))
        for entry in entries:
            self._know(entry)
        self.reused_answers = len(self.answers)
        if entries:
            logger.info("resuming: %s of an interrupted run are reused", self.summary())
        if len(entries) < len(lines):
            logger.warning("%s holds damaged lines, whose work is done again: %d of %d", path, len(lines) - len(entries), len(lines))
            with atomic_writers([path]) as (file,):
                file.writelines(map(_line, entries))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is whole in the system's hands before the next piece of work begins, so that killing this process loses none.
        self._file = path.open("ab", buffering=0)


def _line(entry: Mapping[str, Any]) -> bytes:
    # Numbers in full; a likelihood that is not finite is written too, and ends the rerun with the same message.
    content = json.dumps(entry).encode()
    return hashlib.sha256(content).hexdigest().encode() + b" " + content + b"\n"


def _entries(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        digest, _, content = line.partition(b" ")
        if content.endswith(b"\n") and hashlib.sha256(content[:-1]).hexdigest().encode() == digest:
            yield json.loads(content)


def _locked(path: Path) -> IO[str] | None:
    """The lock; None where another process holds it and does not end soon, as when two experiments need one baseline."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (lock := try_lock(path)) is not None:
            return lock
        if time.monotonic() > deadline:
            logger.warning("another process answers the same (%s): what this one finishes is not kept for a rerun", path)
            return None
        time.sleep(0.2)
