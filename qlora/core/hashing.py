"""Hashes of files, computed once, and the repository that they belong to."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from qlora.core.files import READ_BYTES, read_record, require_file, update_json


def sha256_of(path: Path) -> str:
    """Raises MachineError for what is no file."""
    require_file(path)
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, desc=f"sha256 {path.name}", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def remembered(path: Path, hash_of: Callable[[Path], str], memory: Path) -> str:
    """The file's or folder's hash, computed once: `memory` holds it by path, size, mtime, ctime and inode of every file.

    The ctime can't be set back by a program, so a change with a restored mtime is seen too.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    statuses = [(str(file.relative_to(path)), file.stat()) for file in files]
    state = [[name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] for name, status in statuses]
    known = read_record(memory)
    key = str(path.resolve())
    entry = known.get(key)
    if not isinstance(entry, dict) or entry.get("state") != state or not isinstance(entry.get("hash"), str):
        entry = {"state": state, "hash": hash_of(path)}
        update_json(memory, key, entry)
    return str(entry["hash"])


def project_root() -> Path:
    """The repository a person works in: under `dvc exp run --temp` and `--queue` the stage runs in a copy without ignored files."""
    return Path(os.environ.get("DVC_ROOT", ".")).absolute()
