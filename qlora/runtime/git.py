"""What Git says of this checkout."""

import subprocess
from pathlib import Path


def git(*arguments: str) -> str:
    """What git prints, empty where it fails or there is no git; a path is taken as it is, not as a pattern."""
    try:
        done = subprocess.run(["git", "--literal-pathspecs", *arguments], capture_output=True, encoding="utf-8", errors="replace", check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def committed(path: Path) -> bytes | None:
    """The file's content in HEAD; None where HEAD has no such file."""
    try:
        done = subprocess.run(["git", "cat-file", "blob", f"HEAD:./{path}"], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def is_tracked(path: Path) -> bool:
    """The file, or a file in the folder."""
    return bool(git("ls-files", "--", str(path)))
