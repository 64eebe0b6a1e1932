"""Locks that the system frees when their holder ends, however it ends.

Own code because a message must name the holder ("process 42 on host"), which the package filelock does not keep. It goes once filelock does.
"""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


def try_lock(path: Path) -> IO[str] | None:
    """The file, locked and naming this process, until it is closed; None while another process holds it, or where its folder was removed."""
    try:
        file = path.open("a+", encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    # Held by another, or removed between opening and locking.
    file.close()
    return None


def is_locked(path: Path) -> bool:
    """Whether a process holds it; changes nothing."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
