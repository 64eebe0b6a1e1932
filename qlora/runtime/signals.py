"""Signals that stop a training, with a checkpoint at the end of the current update, or the making of answers, at once.

Own code because transformers' `enable_jit_checkpoint` lets `train()` return normally half-way, so that DVC would record a half-trained adapter. It
goes once the Trainer reports that a signal stopped it, on every process.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qlora.core.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Asked to end by a scheduler, by Ctrl-C, by a scheduler that warns before it kills, by a terminal that closes."""
LAUNCHER = "QLORA_LAUNCHER"
"""Variable that holds the id of the process that launched this one as one of several."""
DEATH_SIGNAL = "QLORA_DEATH_SIGNAL"
"""Variable that holds the signal for this process when the one that launched it ends; SIGTERM without it."""
PR_SET_PDEATHSIG = 1
AT_ONCE_SECONDS = 1.0
"""A second Ctrl-C after this long ends the process at once; a first one may arrive twice, from the terminal and from dvc."""


def handle(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Set the handler for those signals that are not ignored on purpose, by nohup or a shell's background; returns those that were there."""
    return {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}


def ignore(numbers: Iterable[signal.Signals]) -> None:
    """From now on: what is being cleaned up is not interrupted again."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stopping_with(message: Callable[[], str]) -> Iterator[None]:
    """While entered, the first signal raises StoppedError with this message, and the others are ignored; without one the handlers are put back."""
    stopped = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        # One Ctrl-C may arrive twice: cleaning up is not interrupted.
        ignore(SIGNALS)
        raise StoppedError("stopped", f"{signal.Signals(number).name}: {message()}")

    before = handle(SIGNALS, stop)
    try:
        yield
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interruption:
    """While entered: a signal is noted and the work may end itself, once `can_wait`; before that it raises StoppedError.

    The handlers that were there are put back at the end.
    """

    def __init__(self) -> None:
        self.noted: str | None = None
        """Name of the first signal."""
        self.can_wait = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = handle(SIGNALS, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.can_wait:
            ignore(SIGNALS)
            raise StoppedError("stopped", f"{name} before the first update: nothing was lost, run again")
        if self.noted is None:
            self.noted, self._since = name, time.monotonic()
            print(f"\n{name}: a checkpoint is saved at the end of this update, then the training ends", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and time.monotonic() - self._since > AT_ONCE_SECONDS:
            raise StoppedError("stopped", "a second Ctrl-C: ended at once, run again to resume from the last checkpoint")


def handle_early_signals() -> None:
    """Before the libraries, which take seconds: a signal ends the process as one that nothing was lost by, and so does the end of dvc."""
    handle(SIGNALS, _end_at_once)
    _die_with_parent()


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    print(f"\nstopped: [stopped] {signal.Signals(number).name} before anything was done: run again", file=sys.stderr, flush=True)
    os._exit(StoppedError.exit_code)


def _die_with_parent() -> None:
    """Ask Linux for a signal when the parent ends: a killed dvc, or launcher, leaves no stage running.

    Only where dvc is the parent, by `exec` in a stage's command, or the launcher; a stage run by hand may outlive its shell.
    """
    launcher = os.environ.get(LAUNCHER)
    if sys.platform != "linux" or not (launcher or "DVC_ROOT" in os.environ):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(os.environ.get(DEATH_SIGNAL, signal.SIGTERM)))
    # It may have ended before that: then another process, the first one as a rule, has taken its place.
    parent = os.getppid()
    if parent != int(launcher) if launcher else parent == 1 and b"dvc" not in Path("/proc/1/cmdline").read_bytes():
        sys.exit(StoppedError.exit_code)
