"""What DVC has recorded: the hashes of dvc.lock and the objects of its cache. Imports no dvc, which takes a second."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora.errors import InputError
from qlora.manifest import project_root

LOCK = Path("dvc.lock")


def recorded_outputs(lock: Path = LOCK) -> dict[str, str]:
    """md5 of every output of every stage by its path, as dvc.lock has it; empty without a dvc.lock.

    Raises:
        InputError: it is not a lock file.
    """
    try:
        record: Any = YAML(typ="safe", pure=True).load(lock) or {}
        outputs = [out for stage in record.get("stages", {}).values() for out in stage.get("outs", [])]
        return {str(out["path"]): str(out["md5"]) for out in outputs}
    except FileNotFoundError:
        return {}
    except (YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("lock-damaged", f"{lock} is no lock file of DVC ({error}): `git checkout -- {lock}`") from None


def md5_of(path: Path) -> str:
    """As DVC hashes: a file by its bytes, a folder by the list of its files and their hashes."""
    if path.is_dir():
        return hashlib.md5(_listing(path)).hexdigest() + ".dir"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _listing(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": md5_of(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True).encode()


def cached(md5: str) -> Path:
    """Where the cache holds an object, in its default place."""
    return project_root() / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def is_committed(path: Path, output: str, recorded: Mapping[str, str]) -> bool:
    """Whether DVC has taken what lies at `path` as `output`: dvc.lock says so, or, for an experiment in a copy, the cache holds all of it."""
    md5 = md5_of(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return recorded.get(output) == md5 or (cached(md5).is_file() and all(cached(md5_of(file)).is_file() for file in files))
