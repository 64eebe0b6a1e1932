"""The processes of one stage while they run, on one machine (launcher.py) or on several (ray_launcher.py): signals go to all, a failure ends all."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qlora.core.errors import LOST_PEERS, MachineError, StoppedError

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves once one has failed; as a rule they wait for it in vain."""
LOST_SECONDS = 30.0
"""The same while those that ended have only lost another one, which is yet to be heard of: Ray notices a lost machine after 15 to 20 seconds."""
TAIL_CHARS = 4000
"""Of what a failed process printed; rank 0 prints all it has to say by itself."""
POLL_SECONDS = 0.05


class Process(Protocol):
    """A process of this machine (subprocess.Popen) or of another one."""

    @property
    def returncode(self) -> int | None:
        """None while it runs; below 0: the signal that ended it."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class Ranks:
    """Processes by their rank, and the signals that came for them."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.signals: list[int] = []
        self._sent = 0
        self._killed: set[int] = set()

    def note(self, number: int, _frame: object) -> None:
        """A handler: `wait` sends the signal on, so nothing that the handler interrupts is called by it again."""
        self.signals.append(number)

    def require_none_came(self) -> None:
        """Raises StoppedError when a signal came before the processes began."""
        if self.signals:
            raise StoppedError("stopped", f"{signal.Signals(self.signals[0]).name} before anything was done: run again")

    def kill(self) -> None:
        """Those that still run."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self._killed.add(rank)
                process.kill()
                process.wait()

    def wait(self) -> int | None:
        """Wait for all of them; the rank whose failure is the reason of the others', None when none of them failed."""
        deadline = float("inf")
        # Each is asked, not only up to the first that runs: one that has failed may be waited for by all others.
        while None in [process.poll() for process in self.processes]:
            self._send_signals()
            if failures := {process.returncode for process in self.processes} - {None, 0}:
                deadline = min(deadline, time.monotonic() + (LOST_SECONDS if failures == {LOST_PEERS} else GRACE_SECONDS))
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL_SECONDS)
        ended = [(process.returncode, rank) for rank, process in enumerate(self.processes) if process.returncode and rank not in self._killed]
        # Killed before refused, and that before stopped: what comes later follows from it. 75 and LOST_PEERS are the highest.
        return min(ended)[1] if ended else None

    def _send_signals(self) -> None:
        while self._sent < len(self.signals):
            for process in self.processes:
                process.send_signal(self.signals[self._sent])
            self._sent += 1


def explain_failure(rank: int, statuses: Sequence[int | None], signals: Sequence[int], printed: Callable[[int], str], where: str = "") -> int:
    """The exit code of the rank that failed, once its reason is on the terminal.

    Args:
        rank: The one whose failure is the reason of the others'.
        statuses: How each of them ended.
        signals: Those that were sent to all of them.
        printed: What a rank other than the first, which prints by itself, has printed.
        where: Its machine, where there are several.

    Raises:
        MachineError: it could not say the reason itself, because it was killed or lost the others.
        StoppedError: a signal ended it before it could say so.
    """
    count, status = len(statuses), statuses[rank] or 0
    if -status in signals:
        raise StoppedError("stopped", f"{signal.Signals(-status).name} before anything was done: run again")
    if status < 0:
        raise MachineError(
            "rank-died",
            f"process {rank} of {count}{where} was ended by {signal.Signals(-status).name}, the others with it: run again, a training resumes from "
            "its last checkpoint. SIGKILL that nobody sent is most often the machine's memory at its end.",
        )
    if status == LOST_PEERS:
        raise MachineError("rank-died", f"the {count} processes lost each other: run again, a training resumes from its last checkpoint")
    if rank and statuses[0] != status:
        print(f"\nprocess {rank} of {count}{where}:\n{printed(rank)[-TAIL_CHARS:]}", file=sys.stderr, flush=True)
    return status
