"""What every stage and tool shares as a program: exit codes, and messages in place of tracebacks."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

from qlora.errors import StoppedError, UserFacingError
from qlora.interruption import LAUNCHER, SIGNALS, handle, ignore
from qlora.terminal import visible

_UNABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


def positive(text: str) -> float:
    """A finite number above 0, for arguments and variables.

    Raises:
        ValueError: it is none.
    """
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is no finite number above 0")
    return value


def run(main: Callable[[], None]) -> None:
    """Run `main` and end the process: 0 done, 2 wrong input, 3 unable machine, 75 stopped; a bug keeps its traceback and exit code 1."""
    handle(SIGNALS, _raise_stopped)
    try:
        main()
        if LAUNCHER in os.environ:
            _end(0)
    except UserFacingError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            _stop(f"[input-missing] {error.filename} does not exist: `dvc repro` makes what a stage reads.", 2)
        if error.errno not in _UNABLE:
            raise
        place = error.filename2 or error.filename or "the output"
        _stop(f"[file-access] {place}: {error.strerror}. Make room, or give this user the right to use it, then run again.", 3)
    except MemoryError as error:
        _stop(f"[out-of-memory] no memory is left ({error}): use a machine with more, or a smaller file.", 3)
    except Exception:
        if LAUNCHER not in os.environ:
            raise
        traceback.print_exc()
        _end(1)


def _raise_stopped(number: int, _frame: object) -> None:
    """So that what is half-written is removed on the way out."""
    ignore(SIGNALS)
    raise StoppedError("stopped", f"{signal.Signals(number).name}: nothing was written, run again")


def _stop(message: str, exit_code: int) -> None:
    kind = "stopped" if exit_code == StoppedError.exit_code else "error"
    # A message may name what stands in a file.
    print(f"\n{kind}: {visible(message)}", file=sys.stderr, flush=True)
    _end(exit_code)


def _end(exit_code: int) -> None:
    if LAUNCHER in os.environ:
        # At the interpreter's end, what is left of the communication may wait for processes that are gone, or abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
