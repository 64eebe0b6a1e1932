"""What can be said of other processes of this machine."""

from pathlib import Path

PROC = Path("/proc")


def is_abandoned(path: Path) -> bool:
    """Whether it is called NAME.PROCESS.partial, as our writers call what they write aside, and that process is gone.

    False where the system does not list its processes: nothing is removed there.
    """
    process = path.name.split(".")[-2] if path.name.count(".") > 1 else ""
    return process.isdigit() and PROC.exists() and not (PROC / process).exists()
