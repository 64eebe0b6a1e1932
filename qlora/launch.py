"""Several processes for one stage: the same program, once per device, each with a number of its own (its rank).

The numbers travel in torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so a stage that torchrun or a cluster's
scheduler started in that way is not started again. torch's own agent is not used: it kills a signalled process after a fixed time, while
a checkpoint may take longer, and it turns every exit code into 1.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qlora.errors import MachineError, StoppedError
from qlora.interruption import SIGNALS

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves once one has failed; they wait for it in vain as a rule."""
TAIL_CHARS = 4000
"""Of what a failed process printed; all of it is printed by rank 0 alone."""


def is_rank() -> bool:
    """Whether this process is one of several already."""
    return "RANK" in os.environ


def launch(module: str, arguments: Sequence[str], count: int) -> NoReturn:
    """Run `python -m MODULE ARGUMENTS` as `count` processes of this machine, and end as they end.

    Signals go on to each of them. Rank 0 prints; of the others is shown what they printed, where they alone failed.

    Raises:
        MachineError: one was killed.
    """
    ranks = _Ranks()
    for number in SIGNALS:
        signal.signal(number, ranks.forward)
    # Of this process, so that no port is chosen before it is bound.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / str(rank) for rank in range(count)]
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                output = file if rank else None
                process = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                )
            ranks.add(process)
        failed = ranks.wait()
        if failed is None:
            sys.exit(0)
        status = ranks.processes[failed].returncode
        if status == StoppedError.exit_code or (ranks.noted and status == -ranks.noted):
            # Said by rank 0, unless the signal came before it could.
            sys.exit(StoppedError.exit_code)
        if status < 0:
            name = signal.Signals(-status).name
            raise MachineError(
                "rank-died",
                f"process {failed} of {count} was ended by {name}, the others with it: run again, a training goes on from its last checkpoint. "
                "SIGKILL that nobody sent is most often the machine's memory at its end.",
            )
        if failed and ranks.processes[0].returncode != status:
            print(f"\nprocess {failed} of {count}:\n{logs[failed].read_text(encoding='utf-8', errors='replace')[-TAIL_CHARS:]}", file=sys.stderr)
        sys.exit(status)


class _Ranks:
    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.noted = 0
        """The last signal that came, 0 for none."""

    def add(self, process: "subprocess.Popen[bytes]") -> None:
        self.processes.append(process)
        if self.noted:
            process.send_signal(self.noted)

    def forward(self, number: int, _frame: object) -> None:
        self.noted = number
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> int | None:
        """The rank that failed first, once all have ended; None when none did."""
        failed, deadline = None, float("inf")
        while any(process.poll() is None for process in self.processes):
            if failed is None:
                failed = self._failed()
                deadline = time.monotonic() + GRACE_SECONDS if failed is not None else deadline
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
            time.sleep(0.05)
        return self._failed() if failed is None else failed

    def _failed(self) -> int | None:
        """A killed one before one that reports: the others may fail for want of it."""
        ended = [(process.returncode, rank) for rank, process in enumerate(self.processes) if process.poll()]
        return min(ended)[1] if ended else None
