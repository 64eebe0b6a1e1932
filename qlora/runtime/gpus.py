"""Each stage's own GPUs: the workers of a queue see all of the machine's, and would all begin on the first.

A stage locks as many as its params ask for, by files under .dvc/tmp/gpu/ of the repository, and sees no others. The locks are the system's: they
end with the processes that have them, however those end. Which GPUs a stage gets is no part of any hash.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from qlora.core.errors import MachineError
from qlora.params.hardware import HardwareParams
from qlora.runtime.locks import is_locked, try_lock

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
HOLDER = "QLORA_GPU_HOLDER"
"""Variable that holds the id of a process that has its GPUs and was executed again in order to see no others."""
POLL_SECONDS = 0.2


class Lease(NamedTuple):
    """GPUs that no other stage of this repository uses, until the last process that inherited the descriptors ends or closes them."""

    names: list[str]
    descriptors: list[int]

    def release(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def require_devices(hardware: HardwareParams) -> None:
    """Raises MachineError when GPUs were asked for and there is not one for each process."""
    import torch  # noqa: PLC0415 - seconds that a launcher on the CPU need not take

    require_gpu(hardware)
    needed = hardware.processes_per_machine
    if hardware.device == "cuda" and needed > torch.cuda.device_count():
        asked = f"hardware.num_processes = {hardware.num_processes}" + (f" on {hardware.num_machines} machines" if hardware.num_machines > 1 else "")
        raise MachineError("too-few-gpus", f"{asked}, but torch sees {torch.cuda.device_count()} GPU(s) here: each process needs its own")


def require_gpu(hardware: HardwareParams) -> None:
    """Raises MachineError when a GPU is asked for and torch sees none."""
    if hardware.device != "cuda":
        return
    import torch  # noqa: PLC0415 - seconds

    if not torch.cuda.is_available():
        raise MachineError(
            "no-gpu",
            "hardware.device = 'cuda', but torch sees no GPU here: run on a machine with one, "
            "or use a recipe for CPUs (`python -m tools.recipes use tiny-cpu`)",
        )


def visible(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that torch counts: numbers, or UUIDs where those were given."""
    named = os.environ.get(VISIBLE)
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    # CUDA itself goes no further than to the first name that it does not know.
    return list(names)[:count]


def has_lease() -> bool:
    """Whether this process has its GPUs already."""
    return os.environ.get(HOLDER) == str(os.getpid())


def acquire(needed: int, names: Sequence[str], root: Path) -> Lease:
    """As many of the named GPUs, all at once or none of them, as soon as they are free; says which.

    Args:
        needed: At most as many as there are names.
        root: The repository whose stages keep apart.
    """
    # Of this machine: several may see the same folder.
    folder = root / ".dvc" / "tmp" / "gpu" / socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: folder / name.replace("/", "_") for name in names}
    said = False
    while (lease := _try(needed, places, folder / "guard")) is None:
        if not said and (holders := _holders(places)):
            logger.warning("waiting for %d of the GPUs %s: %s", needed, ", ".join(names), holders)
            said = True
        time.sleep(POLL_SECONDS)
    logger.info("GPU %s of %s", ", ".join(lease.names), ", ".join(names))
    return lease


def _try(needed: int, places: dict[str, Path], guard: Path) -> Lease | None:
    """None where too few are free, or another process is choosing: two that each had a part would wait for each other for ever."""
    choosing = try_lock(guard)
    if choosing is None:
        return None
    with choosing, ExitStack() as locks:
        free: dict[str, IO[str]] = {}
        for name, place in places.items():
            if len(free) < needed and (lock := try_lock(place)):
                free[name] = locks.enter_context(lock)
        if len(free) < needed:
            return None
        # A lock lasts as long as any copy of its descriptor.
        return Lease(list(free), [os.dup(lock.fileno()) for lock in free.values()])


def _holders(places: dict[str, Path]) -> str:
    return ", ".join(f"{name} is used by {place.read_text(encoding='utf-8').strip()}" for name, place in places.items() if is_locked(place))


def reexec(lease: Lease) -> None:
    """This program once more, with the same process id and locks: CUDA reads the variable once, and libraries asked it at their import."""
    for descriptor in lease.descriptors:
        os.set_inheritable(descriptor, True)
    os.environ.update({VISIBLE: ",".join(lease.names), HOLDER: str(os.getpid())})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
