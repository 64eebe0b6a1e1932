"""The installed packages against requirements.txt: another version of the stack is another result."""

import logging
import os
import sys
from importlib import metadata
from pathlib import Path

from qlora.core.errors import InputError, MachineError, translate_errors
from qlora.core.files import require_file

logger = logging.getLogger(__name__)


def require_pinned_versions(requirements: Path, *, allow_other: bool) -> None:
    """Compare every `name==version` line with what is installed; local build tags such as +cu130 don't count.

    Raises:
        MachineError: a package is missing or has another version, and `allow_other` is false.
    """
    differences = [
        f"{name}: {found or 'not installed'} in place of {pinned}"
        for name, pinned, found in pinned_packages(requirements)
        if found is None or found.split("+")[0] != pinned
    ]
    if not differences:
        return
    listed = "\n".join(f"  {difference}" for difference in differences)
    message = f"this environment is not the one of {requirements}:\n{listed}\n"
    if allow_other:
        logger.warning("%s", f"{message}runtime.allow_other_versions lets it run; results may differ.")
        return
    raise MachineError(
        "environment-differs",
        f"{message}Run `make setup` (python is {sys.executable}), or set runtime.allow_other_versions: true to run all the same.",
    )


def pinned_packages(requirements: Path) -> list[tuple[str, str, str | None]]:
    """Name, pinned version and installed version (None: it is not) of every package of the file."""
    packages = []
    with translate_errors("requirements-unpinned", requirements, "is not a list of packages", f"see `git diff {requirements}`"):
        require_file(requirements)
        lines = requirements.read_text(encoding="utf-8").splitlines()
    for line in lines:
        entry = line.split("#")[0].split(";")[0].strip()
        if not entry:
            continue
        name, pin, pinned = entry.partition("==")
        if not pin or not name.strip():
            raise InputError("requirements-unpinned", f"{requirements}: {entry!r} is not pinned; write name==version")
        packages.append((name.strip(), pinned.strip(), _installed(name.strip())))
    return packages


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


MEMORY_SHARE = 0.8


def limit_memory() -> None:
    """No file can take more than most of this machine's memory: a program asks in vain, in place of another one being killed for it."""
    if sys.platform == "linux":
        import resource  # noqa: PLC0415 - not there on Windows

        most = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
