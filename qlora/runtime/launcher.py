"""Several processes for one stage: the same program, once per device, each with a number of its own (its rank).

The numbers travel in torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so a stage that torchrun or a cluster's
scheduler started in that way is not started again. torch's own agent is not used: it kills a signalled process after a fixed time, while
a checkpoint may take longer, and it turns every exit code into 1. Several machines meet first (qlora/runtime/rendezvous.py), then each does the same.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qlora import params
from qlora.core.errors import LOST_PEERS, InputError, MachineError, StoppedError, UserFacingError
from qlora.core.hashing import project_root
from qlora.core.text import visible
from qlora.params.hardware import HardwareParams
from qlora.runtime import gpus
from qlora.runtime.rendezvous import Job, Rendezvous, next_job, report_exit
from qlora.runtime.signals import LAUNCHER, SIGNALS, handle

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves once one has failed; as a rule they wait for it in vain."""
TAIL_CHARS = 4000
"""Of what a failed process printed; rank 0 prints all it has to say by itself."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def is_rank() -> bool:
    """Whether this process is one of several already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_processes(module: str, hardware: HardwareParams, count: int) -> None:
    """Launch the stage as `count` processes and return in each of them; the one that launched several exits here, with them.

    On cuda it waits until GPUs are free, and they see no others.

    Raises:
        MachineError: there is no GPU for each of them, one was killed, or other machines did not join.
    """
    if is_rank():
        return
    if count == 1:
        if hardware.device == "cuda" and not gpus.has_lease():
            _see_only_own(hardware)
        return
    gpus.require_devices(hardware)
    lease = _lease(hardware, project_root())
    launch(module, sys.argv[1:], count, hardware.num_machines, lease)


def _see_only_own(asked: HardwareParams) -> None:
    """Return with GPUs of its own; a model that is split over several takes those."""
    names = gpus.visible(torch.cuda.device_count())
    # With none the stage ends soon, and says why.
    lease = gpus.acquire(min(asked.processes_per_machine, len(names)), names, project_root()) if names else None
    if lease and lease.names != names:
        gpus.reexec(lease)


def _lease(asked: HardwareParams, root: Path, interrupted: Callable[[], bool] = lambda: False) -> gpus.Lease | None:
    if asked.device != "cuda":
        return None
    return gpus.acquire(asked.processes_per_machine, gpus.visible(torch.cuda.device_count()), root, interrupted)


def launch(module: str, arguments: Sequence[str], count: int, machines: int = 1, lease: gpus.Lease | None = None) -> NoReturn:
    """Run `python -m MODULE ARGUMENTS` as `count` processes, of this machine or of several, and end as they end.

    Signals are forwarded to each of them. Rank 0 prints; of another one is shown what it printed, where rank 0 can't know why it failed.

    Raises:
        MachineError: one was killed, or the other machines did not come.
        StoppedError: a signal ended them before they could say so.
    """
    ranks = _Ranks()
    ranks.lease = lease
    handle(SIGNALS, ranks.forward)
    job = Job(uuid.uuid4().hex, module, list(arguments), str(Path.cwd()), os.environ.get("DVC_ROOT"), machines, count)
    if machines == 1:
        # Of this process, so that no port is chosen before it is bound; what it says is trusted, so nobody else may speak to it.
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
        sys.exit(_run(job, 0, ranks, variables))
    rendezvous = Rendezvous(job)
    if not rendezvous.wait_for_machines(lambda: bool(ranks.forwarded)):
        raise StoppedError("stopped", f"{signal.Signals(ranks.forwarded[0]).name} before the other machines came: run again")
    lost: MachineError | None = None
    ended = 0
    try:
        ended = _run(job, 0, ranks, {}, lambda: rendezvous.failure() is not None)
    except MachineError as error:
        lost = error
    finally:
        rendezvous.wait_until_ended()
    if (elsewhere := rendezvous.failure()) and (lost or not ended):
        raise MachineError("rank-died", f"the share of another machine ended with {elsewhere}: `python -m tools.join` says there why. Run again.")
    if lost:
        raise lost
    sys.exit(ended)


def join(seconds: float) -> NoReturn:
    """Run this machine's share of all that the first machine begins, as long as something comes every so many seconds.

    Raises:
        MachineError: nothing came.
        StoppedError: a signal did.
    """
    ranks = _Ranks()
    handle(SIGNALS, ranks.forward)
    last: str | None = None
    while found := next_job(last, seconds, lambda: bool(ranks.forwarded)):
        store, job, number = found
        last = job.run
        ended = 1
        try:
            ended = _share(job, number, ranks) if job.module else 0
        finally:
            report_exit(store, number, ended)
        if not job.module:
            sys.exit(0)
        ranks.clear()
    raise StoppedError("stopped", f"{signal.Signals(ranks.forwarded[0]).name}: this machine takes part no more")


def end_all(machines: int) -> None:
    """Tell the machines that wait in `join` that nothing more comes; those that are not there are not waited for long."""
    if machines > 1:
        with suppress(MachineError):
            Rendezvous(Job(uuid.uuid4().hex, "", [], "", None, machines, machines)).wait_for_machines(lambda: False)


def _share(job: Job, number: int, ranks: "_Ranks") -> int:
    """This machine's part of a stage, and how it ended; why it could not be done is said here."""
    print(f"machine {number + 1} of {job.machines}: {job.module}", flush=True)
    try:
        os.chdir(job.folder)
        asked = params.load(Path("params.yaml")).hardware
        gpus.require_devices(asked)
        ranks.lease = _lease(asked, Path(job.root or job.folder), lambda: bool(ranks.forwarded))
        return _run(job, number, ranks, {"DVC_ROOT": job.root} if job.root else {})
    except FileNotFoundError as error:
        message, ended = f"[input-missing] {error.filename} is not here: all machines see the same folder (docs/cluster.md)", InputError.exit_code
    except UserFacingError as error:
        message, ended = str(error), error.exit_code
    finally:
        if ranks.lease:
            ranks.lease.release()
            ranks.lease = None
    print(f"\nerror: {visible(message)}", file=sys.stderr, flush=True)
    return ended


def _run(job: Job, machine: int, ranks: "_Ranks", variables: Mapping[str, str], failed_elsewhere: Callable[[], bool] = lambda: False) -> int:
    """The processes of this machine, begun and waited for; the exit code of the one that failed first, 0 if none did of itself."""
    here = job.processes // job.machines
    shared = {
        **os.environ,
        **variables,
        **({gpus.VISIBLE: ",".join(ranks.lease.names)} if ranks.lease else {}),
        LAUNCHER: str(os.getpid()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(job.processes),
        "LOCAL_WORLD_SIZE": str(here),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = {machine * here + place: Path(folder) / str(place) for place in range(here)}
        try:
            for place, (rank, log) in enumerate(logs.items()):
                with log.open("wb") as file:
                    output = file if rank else None
                    process = subprocess.Popen(
                        [sys.executable, "-m", job.module, *job.arguments],
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(place)},
                        stdout=output,
                        stderr=output,
                        # A terminal's Ctrl-C comes by way of this process, once.
                        start_new_session=True,
                        # Until the last of them has ended, also where this process was killed.
                        pass_fds=ranks.lease.descriptors if ranks.lease else (),
                    )
                ranks.add(process)
            failed = ranks.wait(failed_elsewhere)
        finally:
            ranks.kill()
        if failed is None:
            return 0
        _explain_failure(machine * here + failed, job.processes, ranks, ranks.processes[failed].returncode, logs)
        return ranks.processes[failed].returncode


def _explain_failure(rank: int, count: int, ranks: "_Ranks", status: int, logs: Mapping[int, Path]) -> None:
    """Raises where the processes themselves could not say it."""
    if -status in ranks.forwarded:
        raise StoppedError("stopped", f"{signal.Signals(-status).name} before anything was done: run again")
    if status < 0:
        raise MachineError(
            "rank-died",
            f"process {rank} of {count} was ended by {signal.Signals(-status).name}, the others with it: run again, a training resumes from its "
            "last checkpoint. SIGKILL that nobody sent is most often the machine's memory at its end.",
        )
    if status == LOST_PEERS:
        raise MachineError("rank-died", f"the {count} processes lost each other: run again, a training resumes from its last checkpoint")
    if rank and (0 not in logs or ranks.processes[0].returncode != status):
        printed = logs[rank].read_text(encoding="utf-8", errors="replace")[-TAIL_CHARS:]
        print(f"\nprocess {rank} of {count}:\n{printed}", file=sys.stderr, flush=True)


class _Ranks:
    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.forwarded: list[int] = []
        """Signals that came."""
        self.lease: gpus.Lease | None = None
        """Theirs; None on the CPU."""
        self._killed: set[int] = set()

    def add(self, process: "subprocess.Popen[bytes]") -> None:
        self.processes.append(process)
        for number in self.forwarded:
            process.send_signal(number)

    def forward(self, number: int, _frame: object) -> None:
        self.forwarded.append(number)
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        """Whoever still runs."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self._killed.add(rank)
                process.kill()
                process.wait()

    def clear(self) -> None:
        """All of them: others will be begun."""
        self.processes.clear()
        self._killed.clear()

    def wait(self, failed_elsewhere: Callable[[], bool] = lambda: False) -> int | None:
        """The rank whose failure is the reason of the others', once all have ended; None when none of these failed of itself."""
        deadline = float("inf")
        # Each is asked, not only up to the first that runs: one that has failed may be waited for by all others.
        while None in [process.poll() for process in self.processes]:
            if any(process.returncode for process in self.processes) or failed_elsewhere():
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        ended = [(process.returncode, rank) for rank, process in enumerate(self.processes) if process.returncode and rank not in self._killed]
        # Killed before refused, and that before stopped: what comes later follows from it. 75 and LOST_PEERS are the highest.
        return min(ended)[1] if ended else None
