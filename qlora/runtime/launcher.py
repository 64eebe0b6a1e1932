"""Several processes for one stage: the same program, once per device, each with a number of its own (its rank).

The numbers travel in torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so a stage that torchrun or a cluster's
scheduler started in that way is not started again. torch's own agent is not used: it kills a signalled process after a fixed time, while
a checkpoint may take longer, and it turns every exit code into 1.

Here are the processes of one machine. Those of several are Ray's (qlora/runtime/ray_launcher.py), which a laptop or a single card should not have to
install: a Ray of one machine takes seconds to begin and end, and would place nothing.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qlora.core.errors import StoppedError
from qlora.core.hashing import project_root
from qlora.params.hardware import HardwareParams
from qlora.runtime import gpus, restoring
from qlora.runtime.ranks import Ranks, explain_failure
from qlora.runtime.signals import LAUNCHER, SIGNALS, handle

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def is_rank() -> bool:
    """Whether this process was launched already: as one of several, or as the only one of a cluster."""
    return LAUNCHER in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_processes(module: str, hardware: HardwareParams, count: int) -> None:
    """Launch the stage as `count` processes and return in each of them; the one that launched several exits here, with them.

    On cuda it waits until GPUs are free, and they see no others.

    Raises:
        MachineError: there is no GPU for each of them, one was killed, or no Ray cluster has the machines.
    """
    if is_rank():
        return
    if hardware.num_machines > 1:
        from qlora.runtime import ray_launcher  # noqa: PLC0415 - Ray is no requirement of one machine

        ray_launcher.launch(module, sys.argv[1:], hardware, count)
    if count == 1:
        if hardware.device == "cuda" and not gpus.has_lease():
            _see_only_own(hardware)
        return
    gpus.require_devices(hardware)
    names = gpus.visible(torch.cuda.device_count()) if hardware.device == "cuda" else []
    launch(module, sys.argv[1:], count, gpus.acquire(count, names, project_root()) if names else None)


def _see_only_own(asked: HardwareParams) -> None:
    """Return with GPUs of its own; a model that is split over several takes those."""
    names = gpus.visible(torch.cuda.device_count())
    # With none the stage ends soon, and says why.
    lease = gpus.acquire(min(asked.num_processes, len(names)), names, project_root()) if names else None
    if lease and lease.names != names:
        gpus.reexec(lease)


def launch(module: str, arguments: Sequence[str], count: int, lease: gpus.Lease | None = None) -> NoReturn:
    """Run `python -m MODULE ARGUMENTS` as `count` processes of this machine and end as they end.

    Signals are forwarded to each of them. Rank 0 prints; of another one is shown what it printed, where rank 0 can't know why it failed.

    Raises:
        MachineError: one was killed.
        StoppedError: a signal ended them before they could say so.
    """
    ranks = Ranks()
    handle(SIGNALS, ranks.note)
    # What it says is trusted, so nobody else may speak to it.
    store = serve_store("127.0.0.1")
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        LAUNCHER: str(os.getpid()),
        **({gpus.VISIBLE: ",".join(lease.names)} if lease else {}),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / str(rank) for rank in range(count)]
        try:
            for rank, log in enumerate(logs):
                environment = {**os.environ, **variables, **rank_variables(rank, count, rank, count)}
                ranks.processes.append(_started([module, *arguments], environment, log if rank else None, lease))
            failed = ranks.wait()
        finally:
            ranks.kill()
        if failed is None:
            sys.exit(0)
        statuses = [process.returncode for process in ranks.processes]
        status = explain_failure(failed, statuses, ranks.signals, lambda rank: logs[rank].read_text(encoding="utf-8", errors="replace"))
        if status != StoppedError.exit_code and (advice := restoring.advice()):
            print(advice, file=sys.stderr, flush=True)
        sys.exit(status)


def serve_store(host: str) -> Any:
    """The store at which torch's processes meet, at a free port of this process, so that no port is chosen before it is bound."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def rank_variables(rank: int, count: int, place: int, places: int) -> dict[str, str]:
    """torchrun's variables of one process: its number of all, and its place of those of its machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(place),
        "LOCAL_WORLD_SIZE": str(places),
        # The store is the launcher's.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _started(command: Sequence[str], environment: Mapping[str, str], log: Path | None, lease: gpus.Lease | None) -> "subprocess.Popen[bytes]":
    """One process; without a log it prints."""
    output = log.open("wb") if log else None
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C comes by way of this process, once.
            start_new_session=True,
            # Until the last of them has ended, also where this process was killed.
            pass_fds=lease.descriptors if lease else (),
        )
    finally:
        if output:
            output.close()
