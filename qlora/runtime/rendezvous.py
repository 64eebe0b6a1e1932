"""Several machines for one stage: the first one runs it, and each other one waits in `python -m tools.join` for its share.

They meet at MASTER_ADDR and MASTER_PORT, torchrun's variables, where the first machine's launcher keeps a store: it says there what is to be run,
each other machine takes a number and begins its processes, and says at the end how they ended. Whoever can speak to that port can take part: it must
be one of a network that is trusted, as torch's own rendezvous is. All machines see the same folder.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from qlora.core.errors import InputError, MachineError
from qlora.runtime.command import positive

JOIN_TIMEOUT_SECONDS = 300.0
"""How long the first machine waits for the others; they may still be starting. QLORA_RENDEZVOUS_SECONDS sets another time."""
END_SECONDS = 10.0
"""How long it waits for them to say how they ended."""
POLL_SECONDS = 0.2
ONE_TRY = timedelta(seconds=2)


class Job(NamedTuple):
    """What each machine is to run."""

    run: str
    """Of this run alone: a machine takes part once."""
    module: str
    arguments: list[str]
    folder: str
    root: str | None
    """DVC_ROOT."""
    machines: int
    processes: int
    """Of all machines."""


def address() -> tuple[str, int]:
    """Where the machines meet.

    Raises:
        InputError: the variables are not set, or no address.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            "rendezvous-address",
            f"several machines meet at MASTER_ADDR:MASTER_PORT, which are {host!r} and {port!r}: set them, on each machine, to the first "
            "machine's name and a free port of it (docs/cluster.md)",
        )
    return host, int(port)


def join_timeout_seconds() -> float:
    """Raises InputError when the variable holds no number of seconds."""
    asked = os.environ.get("QLORA_RENDEZVOUS_SECONDS", str(JOIN_TIMEOUT_SECONDS))
    try:
        return positive(asked)
    except ValueError:
        raise InputError("rendezvous-address", f"QLORA_RENDEZVOUS_SECONDS = {asked!r} is no number of seconds above 0") from None


class Rendezvous:
    """The first machine's side."""

    def __init__(self, job: Job) -> None:
        """Raises MachineError when the port is taken."""
        self.job = job
        self._timeout_seconds = join_timeout_seconds()
        host, port = address()
        try:
            self.store = TCPStore(host, port, is_master=True, wait_for_workers=False)
        except (DistError, RuntimeError, OSError) as error:
            first = str(error).splitlines()[0]
            raise MachineError(
                "rendezvous-address", f"this machine can't listen at {host}:{port} ({first}): MASTER_ADDR must be its own name, MASTER_PORT free"
            ) from None
        self.store.set("work", json.dumps(job))

    def wait_for_machines(self, interrupted: Callable[[], bool]) -> bool:
        """Until every other machine is here; False when `interrupted` said so before.

        Raises:
            MachineError: they did not come in time.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while (here := self.store.add("machines", 0)) < self.job.machines - 1:
            if interrupted():
                return False
            if time.monotonic() > deadline:
                host, port = address()
                raise MachineError(
                    "rendezvous-timeout",
                    f"hardware.num_machines = {self.job.machines}, but after {self._timeout_seconds:.0f} s {here} other machine(s) had joined at "
                    f"{host}:{port}: run `python -m tools.join` on each of them, and see that they reach this address",
                )
            time.sleep(POLL_SECONDS)
        return True

    def wait_until_ended(self) -> None:
        """For a while, until every other machine has said how it ended: the store must be there until then."""
        deadline = time.monotonic() + END_SECONDS
        while self.store.add("ended", 0) < self.store.add("machines", 0) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def failure(self) -> int | None:
        """The first exit code other than 0 that another machine has told so far."""
        codes = [int(self.store.get(f"code/{number}")) for number in range(1, self.job.machines) if self.store.check([f"code/{number}"])]
        return next((code for code in codes if code), None)


def next_job(last: str | None, seconds: float, interrupted: Callable[[], bool]) -> tuple[Any, Job, int] | None:
    """Another machine's side: the store, what to run, and this machine's number, as soon as the first one has something else than the last.

    None when `interrupted` said so before. What has all its machines is passed over: this one waits for the next.

    Raises:
        MachineError: nothing came in so many seconds.
    """
    host, port = address()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if interrupted():
            return None
        try:
            store = TCPStore(host, port, is_master=False, timeout=ONE_TRY)
            job = Job(*json.loads(store.get("work")))
            if job.run != last:
                number = store.add("machines", 1)
                if number < job.machines:
                    return store, job, number
                store.add("machines", -1)
                last = job.run
        except (DistError, RuntimeError, OSError):
            pass  # Nobody there yet, or not any more.
        time.sleep(POLL_SECONDS)
    raise MachineError(
        "rendezvous-timeout",
        f"nothing to run came from {host}:{port} in {seconds:.0f} s: is `dvc repro` running there, with hardware.num_machines > 1?",
    )


def report_exit(store: Any, number: int, code: int) -> None:
    """To the first machine, if it is still there."""
    try:
        store.set(f"code/{number}", str(code))
        store.add("ended", 1)
    except (DistError, RuntimeError):
        pass
