"""Errors that a user can act on, and how those of libraries become one. Each names the place, the value and the way out, and has a stable code.

UserFacingError
├── InputError      exit 2: params, data or model are wrong
├── MachineError    exit 3: this machine or environment is not able
└── StoppedError    exit 75: a signal stopped the work; run again to resume
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

LOST_PEERS = 76
"""Exit code of a process that stopped because another one of the same run had: the launcher reports that other one."""


class UserFacingError(Exception):
    """Shown as one message without a traceback; any other exception is a bug.

    Args:
        code: Stable key of docs/troubleshooting.md, such as "data-missing".
        message: What is wrong, where, with which value, and what to do.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["UserFacingError"], tuple[str, str]]:
        """Errors travel from a worker process to the one that shows them."""
        return type(self), (self.code, self.message)


class InputError(UserFacingError):
    exit_code = 2


class MachineError(UserFacingError):
    exit_code = 3


class StoppedError(UserFacingError):
    exit_code = 75


_ROOM = "make room on that disk, then run again"
_RIGHT = "give this user the right to use it, then run again"
_OTHER = "something else lies there: move it away, then run again"
_FILES = "too many files are open: raise `ulimit -n`, or run fewer jobs at once"
_WAYS_OUT = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: _RIGHT,
    errno.ENOTDIR: _OTHER,
    errno.EISDIR: _OTHER,
    errno.ELOOP: _OTHER,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EFBIG: "raise `ulimit -f`, or use a file system that takes larger files",
    errno.ENAMETOOLONG: "give it a shorter name, or move the repository to a shorter path",
    errno.EIO: "the disk, or the connection to it, fails: see `dmesg`",
}
_MOST_SHOWN = 1000
_OF_DEVICE = re.compile("can't allocate memory|CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|cuSOLVER|CUSOLVER|NCCL|NVIDIA")


def machine_error(error: BaseException, place: object) -> MachineError | None:
    """The error as a MachineError, where the disk, rights or limits of this machine are at fault; None for any other.

    Args:
        place: Where it arose, for an error that names no file.
    """
    if isinstance(error, OSError):
        number, reason, named = error.errno, error.strerror, error.filename2 or error.filename or place
    else:
        # Libraries in Rust, such as safetensors, name the errno in their own errors.
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, reason, named = int(found[1]) if found else None, str(error), place
    return MachineError("file-access", f"{named}: {reason}: {_WAYS_OUT[number]}") if number in _WAYS_OUT else None


@contextmanager
def translate_errors(code: str, place: object, problem: str, way_out: str) -> Iterator[None]:
    """Run a library on files that others wrote: whatever it raises becomes one message.

    Args:
        code: Of the InputError.
        place: The file or folder that the message names first.
        problem: What is wrong with it then: "is no manifest".
        way_out: What to do about it, after a colon.

    Raises:
        InputError: with the library's own words. Errors for want of memory, and of a GPU, are raised as they are: the files are not at fault.
        MachineError: see `machine_error`.
    """
    try:
        yield
    except (UserFacingError, MemoryError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException") or _is_of_device(error):
            raise
        if unable := machine_error(error, place):
            raise unable from error
        reason = f"{type(error).__name__}: {error}"[:_MOST_SHOWN].rstrip(".")
        raise InputError(code, f"{place} {problem} ({reason}): {way_out}") from error


def _is_of_device(error: BaseException) -> bool:
    """Whether torch, which is not imported here, raised it for want of memory or because the GPU failed."""
    return type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") or _OF_DEVICE.search(str(error)) is not None
