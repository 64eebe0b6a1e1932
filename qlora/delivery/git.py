"""What Git says of this checkout."""

import subprocess
from pathlib import Path


def git(*arguments: str) -> str:
    """What git prints, empty where it fails; a path is taken as it is, not as a pattern."""
    done = subprocess.run(["git", "--literal-pathspecs", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def is_tracked(path: Path) -> bool:
    """The file, or a file in the folder."""
    return bool(git("ls-files", "--", str(path)))
