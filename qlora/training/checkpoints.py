"""Checkpoints of an unfinished training, in a folder named by everything that made them.

Another parameter, dataset, base model or line of code is another folder: a changed run never resumes from foreign state.

    <fingerprint>/lock            held by the process that trains
    <fingerprint>/checkpoint-40/  a state to resume from; `sums.json`, written last, holds the sha256 of every file
    <fingerprint>/saving/         a state that is being written
    <fingerprint>/finished/       what the training made, once it ended

Of several processes the first one alone locks, seals and removes; all see the same folder.

Own code because the Trainer's checkpoints are neither atomic nor verified: a truncated one crashes the run, and one of other params or data is
resumed without a word. It goes once the Trainer writes them aside, seals them with hashes and refuses foreign ones.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qlora.core.dvc_lock import is_committed, recorded_outputs, unfinished_folder
from qlora.core.errors import MachineError
from qlora.core.files import json_document, write_json
from qlora.core.hashing import sha256_of
from qlora.model.distributed import barrier, broadcast, is_main_process
from qlora.runtime.locks import try_lock

logger = logging.getLogger(__name__)

SUMS = "sums.json"
KEPT = 2
"""Checkpoints that stay: the newest, and one to fall back on when it is damaged."""
SLACK_BYTES = 50_000_000
"""For tokenizer, metrics and predictions, and for what else writes there."""
PATIENCE_SECONDS = 60
"""How long a training waits for one that is just ending on the same folder."""


def checkpoint_folder(params: Mapping[str, Any], inputs: Iterable[Path]) -> Path:
    """Where the checkpoints of a training are: a folder named by its params, its inputs, and the code and packages that dvc.yaml lists for it."""
    return unfinished_folder("checkpoints", "train", params, inputs)


def bytes_written(trainable: int, optim: str, *, keep_best: bool = False) -> int:
    """The most that a training of so many weights takes of a disk."""
    weights = 4 * trainable
    moments = 2 * trainable if optim.endswith("8bit") else 8 * trainable
    # One more than is kept, while it is written; the adapter as the stage's output, in DVC's cache, and as what was finished.
    in_checkpoint = weights * (2 if keep_best else 1) + moments
    return (KEPT + 1) * in_checkpoint + 3 * weights + SLACK_BYTES


def require_disk(folder: Path, needed: int) -> None:
    """Raises MachineError when the folder's disk has fewer bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            "disk-space", f"{folder} has {free / 1e6:,.0f} MB left, the training needs up to {needed / 1e6:,.0f} MB: make room, then run again"
        )


class Checkpoints:
    """The folder of one training, locked against others while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.aside = folder / "saving"
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Checkpoints":
        """Raises MachineError when another process trains here and does not end soon."""
        if is_main_process():
            self._lock = _locked(self.folder / "lock", time.monotonic() + PATIENCE_SECONDS)
            shutil.rmtree(self.aside, ignore_errors=True)
        barrier()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def newest(self) -> Path | None:
        """The checkpoint of the highest step whose files are as they were written; damaged ones are named and removed."""
        return broadcast(self._newest() if is_main_process() else None)

    def _newest(self) -> Path | None:
        for path in sorted(self.folder.glob("checkpoint-*"), key=_step, reverse=True):
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning("%s can't be resumed from (%s): using the one before it", path, damage)
            shutil.rmtree(path)
        return None

    def require_room(self, trainable: int, optim: str, *, keep_best: bool = False) -> None:
        """Raises MachineError when the disk can't hold what a training of so many weights will write."""
        for folder in (self.folder, Path.cwd()):
            require_disk(folder, bytes_written(trainable, optim, keep_best=keep_best))

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """The block writes `aside`/checkpoint-STEP; it takes its place only when all of it, from every process, is on the disk.

        Raises:
            MachineError: the disk is full; the checkpoints that were there are untouched.
        """
        written = self.aside / f"checkpoint-{step}"
        try:
            yield
            barrier()
            if is_main_process():
                _seal(written)
                shutil.rmtree(self.folder / written.name, ignore_errors=True)
                written.rename(self.folder / written.name)
                _sync(self.folder)
                for path in sorted(self.folder.glob("checkpoint-*"), key=_step)[:-KEPT]:
                    shutil.rmtree(path)
            barrier()
        except Exception as error:
            if not _is_full(error, self.folder):
                raise
            raise MachineError(
                "disk-full",
                f"no room for the checkpoint of step {step} in {self.folder}: {error}. Make room and run again: "
                "the training resumes from the checkpoint before it.",
            ) from error
        finally:
            if is_main_process():
                shutil.rmtree(self.aside, ignore_errors=True)

    def finish(self, outputs: Mapping[str, Path]) -> None:
        """Keep what the training made, by name, in place of the checkpoints: DVC may not find the room to take it."""
        try:
            self.aside.mkdir()
            for name, path in outputs.items():
                _copy(path, self.aside / name)
            _seal(self.aside)
            shutil.rmtree(self.folder / "finished", ignore_errors=True)
            self.aside.rename(self.folder / "finished")
            _sync(self.folder)
        except OSError as error:
            # What was made stands; if DVC finds no room either, the last checkpoint is where a rerun begins.
            logger.warning("%s can't keep what was finished (%s)", self.folder, error)
            return
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)

    def finished(self) -> Path | None:
        """What an earlier run of the same training made, if it is whole."""
        path = self.folder / "finished"
        return path if path.is_dir() and _damage(path) is None else None

    def reuse_finished(self, outputs: Mapping[str, Path]) -> bool:
        """Put what an earlier run finished and DVC failed to store where this one would write it; False, and other trainings' leftovers are
        removed, where there is no such run."""
        finished = self.finished()
        if finished and not is_committed(finished / "adapter_folder", str(outputs["adapter_folder"]), recorded_outputs()):
            logger.info("reusing the finished adapter of an earlier run that DVC failed to store: %s", finished)
            self._copy_finished(outputs)
            return True
        self.prune()
        return False

    def _copy_finished(self, outputs: Mapping[str, Path]) -> None:
        for name, path in outputs.items():
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            _copy(self.folder / "finished" / name, partial)
            if path.is_dir():
                shutil.rmtree(path)
            partial.replace(path)

    def prune(self) -> None:
        """Remove the folders of other trainings that ended."""
        for path in self.folder.parent.glob("*/finished"):
            if path.parent != self.folder and (lock := try_lock(path.parent / "lock")):
                # Gone at once: a training that begins there makes a folder of its own.
                gone = path.parent.with_name(f"{path.parent.name}.{os.getpid()}.gone")
                path.parent.rename(gone)
                shutil.rmtree(gone)
                lock.close()


def _locked(path: Path, deadline: float) -> IO[str]:
    said = False
    path.parent.mkdir(parents=True, exist_ok=True)
    while (lock := try_lock(path)) is None:
        try:
            holder = path.read_text(encoding="utf-8").strip() or "another process"
        except FileNotFoundError:
            # Removed by a training that ended; see prune.
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        if time.monotonic() > deadline:
            raise MachineError("train-running", f"{holder} is training in {path.parent}: wait until it ends, or end it, then run again")
        if not said:
            logger.warning("waiting for %s, which trains in %s", holder, path.parent)
            said = True
        time.sleep(0.2)
    return lock


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _seal(folder: Path) -> None:
    """Write the sums of all files once every byte of them is on the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    write_json(folder / SUMS, _sums(folder))
    _sync(folder / SUMS)
    _sync(folder)


def _sums(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def _damage(folder: Path) -> str | None:
    """What differs from the sums; None when not a byte does."""
    try:
        content, found = (folder / SUMS).read_bytes(), _sums(folder)
    except OSError as error:
        return str(error)
    if content == json_document(found):
        return None
    try:
        written: dict[str, str] = json.loads(content)
        names = [name for name in sorted({*found, *written}) if written.get(name) != found.get(name)]
    except (ValueError, AttributeError, TypeError):
        names = []
    return f"not as it was written: {', '.join(names) or SUMS}"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for want of room; torch and safetensors say so in exceptions of their own."""
    return "space left" in str(error) or shutil.disk_usage(folder).free < 1 << 20
