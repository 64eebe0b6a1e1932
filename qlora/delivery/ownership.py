"""What a tool may replace: what it wrote itself, as it wrote it, and its own files as Git has them. All else is somebody's work."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.core.errors import InputError
from qlora.core.files import read_record, update_json, write_json
from qlora.core.hashing import project_root, sha256_of
from qlora.core.text import in_shell
from qlora.runtime.git import git, is_tracked

MEMORY = Path(".dvc/tmp/written.json")
"""Path and sha256 of each file as a tool left it."""


@contextmanager
def replacing(path: Path, *, own: bool) -> Iterator[None]:
    """Write the file inside; it is then the tool's.

    Args:
        own: It is a place of the tool's, not one that its user names: what Git has can be had again.

    Raises:
        InputError: something else is there.
    """
    require_replaceable(path, own=own)
    yield
    note(path)


def write_own_json(path: Path, record: Mapping[str, Any]) -> None:
    """A record at a place of the tool's own; raises InputError where something else is."""
    with replacing(path, own=True):
        write_json(path, record)


def require_replaceable(path: Path, *, own: bool) -> None:
    """Raises InputError unless nothing is there, or the file as a tool wrote it, or, of its own, as Git has it."""
    if not os.path.lexists(path):
        return
    way_out = "move it away" if own else "move it away, or name another place"
    if path.is_symlink() or not path.is_file():
        raise InputError("occupied", f"{path} is a {'link' if path.is_symlink() else 'folder'}, which is not replaced: {way_out}")
    written = read_record(project_root() / MEMORY).get(_key(path))
    if (isinstance(written, dict) and written.get("sha256") == sha256_of(path)) or (own and _is_as_in_git(path)):
        return
    committed = f", or keep it: `git add {in_shell(path)} && git commit`" if own else ""
    raise InputError("occupied", f"{path} holds something else than this tool wrote there, which is not replaced: {way_out}{committed}")


def note(path: Path) -> None:
    """The file as it is now was written by a tool."""
    update_json(project_root() / MEMORY, _key(path), {"sha256": sha256_of(path)})


def require_replaceable_folder(folder: Path, listed: Any, *besides: str) -> None:
    """Raises InputError unless nothing is there, or a folder whose every file is listed with its sha256, none of it in Git.

    Args:
        listed: From the folder's own manifest, which may hold anything: {name: {"sha256": hex}}.
        besides: Files that need not be listed, such as the manifest.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError("occupied", f"{folder} is not a folder that this tool wrote: move it away, or name another place")
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        entry = listed.get(name) if isinstance(listed, dict) else None
        is_listed = isinstance(entry, dict) and not path.is_symlink() and sha256_of(path) == entry.get("sha256")
        if name not in besides and not is_listed:
            raise InputError("occupied", f"{path} was not written by this tool, or has changed: move {folder} away, or name another place")
    if is_tracked(folder):
        raise InputError("occupied", f"Git tracks files in {folder}, which is not replaced: name another place")


def _key(path: Path) -> str:
    return os.path.relpath(path.absolute(), project_root())


def _is_as_in_git(path: Path) -> bool:
    return is_tracked(path) and not git("status", "--porcelain", "--", str(path))
