"""Fetch a dataset of the Hugging Face Hub at one commit into data/raw/NAME, and track it with DVC.

A branch or tag is looked up once, and the commit is what is written.

    python -m tools.fetch ORG/NAME
    python -m tools.fetch ORG/NAME --revision <40 hex> --files 'data/train-*' --name NAME-train      some files, in a folder of their own

Every file is compared with the Hub's own sha256 or Git sum before it comes to its place; an interrupted download resumes when the command is run
again. Writes data/raw/NAME.source.json (source, licence, and sha256 of every file; it goes into Git) and runs `dvc add`. HF_ENDPOINT names a mirror,
HF_TOKEN opens what is gated or private. docs/hub.md has a worked example.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from qlora.core.errors import InputError, MachineError
from qlora.core.files import json_document
from qlora.core.hashing import sha256_of
from qlora.core.text import in_shell
from qlora.delivery import hub
from qlora.delivery.hub import HubFile
from qlora.delivery.ownership import note, require_replaceable, write_own_json
from qlora.runtime import command
from qlora.runtime.git import is_tracked
from qlora.runtime.locks import try_lock

RAW = Path("data/raw")
LINES_SHOWN = 10


def fetch(repo_id: str, revision: str, name: str, patterns: Sequence[str], *, force: bool) -> tuple[Path, str]:
    """Download the files to data/raw/NAME, all or none, and write the manifest. Returns the folder and the commit.

    Args:
        patterns: Of paths in the repository, as a shell has them; none means all.
        force: Replace a folder that holds something else.

    Raises:
        InputError: the Hub does not give that, or something else lies there.
        MachineError: the Hub can't be reached, or sends what it does not list.
    """
    commit = hub.read_commit(repo_id, revision, "dataset")
    files = [file for file in commit.files if not patterns or any(fnmatchcase(file.path, pattern) for pattern in patterns)]
    if not files:
        listed = ", ".join(file.path for file in commit.files[:LINES_SHOWN]) or "nothing"
        raise InputError("fetch-nothing", f"no file of {repo_id} is called like {' or '.join(patterns) or 'anything'}: it holds {listed}")
    hub.require_distinct(repo_id, files)
    if read_by_dvc := [file.path for file in files if file.path.endswith(".dvc") or PurePosixPath(file.path).name == "dvc.yaml"]:
        raise InputError(
            "hub-path", f"{repo_id} lists {read_by_dvc[0]!r}, which DVC would read as a part of this project: choose the data with --files and --name"
        )
    folder = RAW / name
    with _only_here(folder):
        problems = _differences(folder, files) if folder.exists() else []
        if problems and (not force or is_tracked(folder)):
            shown = "".join(f"\n  {problem}" for problem in problems[:LINES_SHOWN])
            raise InputError(
                "fetch-occupied", f"{folder} holds something else:{shown}\nGive another --name, or --force to replace it (never what Git tracks)."
            )
        if problems or not folder.exists():
            # What says where other data are from; it may be all that is left of them.
            for path in (source_of(folder), Path(f"{folder}.dvc")):
                require_replaceable(path, own=True)
            _download(commit, files, folder)
        entries = {file.path: {"bytes": file.size, "sha256": file.digest if file.is_lfs else sha256_of(folder / file.path)} for file in files}
        _write_manifest(source_of(folder), {"repo_id": repo_id, "revision": commit.revision, "license": commit.license, "files": entries})
    return folder, commit.revision


def _write_manifest(path: Path, record: dict[str, Any]) -> None:
    """Write it unless it is there."""
    if not path.is_file() or path.read_bytes() != json_document(record):
        write_own_json(path, record)


def source_of(folder: Path) -> Path:
    """The manifest of a fetched folder."""
    return folder.with_name(f"{folder.name}.source.json")


@contextmanager
def _only_here(folder: Path) -> Iterator[None]:
    """From the look at what lies there to its manifest: another fetch between the two would get this one's manifest, or be replaced unasked."""
    RAW.mkdir(parents=True, exist_ok=True)
    lock = try_lock(RAW / f".{folder.name}.lock")
    if lock is None:
        raise MachineError("fetch-running", f"another process fetches {folder}: wait for it, or end it")
    with lock:
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _differences(folder: Path, files: Sequence[HubFile]) -> list[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    listed = {file.path: file for file in files}
    wrong = [f"{name} is missing" for name in sorted(set(listed) - found)] + [f"{name} is not among them" for name in sorted(found - set(listed))]
    return wrong + [f"{name} has other bytes" for name in sorted(found & set(listed)) if not hub.holds(folder / name, listed[name])]


def _download(commit: hub.Commit, files: Sequence[HubFile], folder: Path) -> None:
    """Download beside the place, then move the whole folder there."""
    # Hidden: no folder of raw data is read with it. What is in it stays for the next try.
    staging, replaced = folder.with_name(f".{folder.name}.fetch"), folder.with_name(f".{folder.name}.replaced")
    staging.mkdir(exist_ok=True)
    content = staging / "content"
    for file in files:
        hub.download(commit, file, content / file.path)
    _remove_others(content, {content / file.path for file in files})
    _remove(replaced)
    # Before anything moves: ended from here on, it leaves data without a manifest, never with that of other data.
    source_of(folder).unlink(missing_ok=True)
    if folder.exists() or folder.is_symlink():
        folder.rename(replaced)
    content.rename(folder)
    for left in (replaced, staging):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """What a try with other --files left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path not in wanted:
            path.unlink()


def track(folder: Path) -> None:
    """`dvc add`.

    Raises:
        MachineError: DVC can't; the message ends with its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", str(folder)], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        said = (done.stderr + done.stdout).strip()[-1000:]
        raise MachineError(
            "fetch-dvc", f"{folder} is whole, but `dvc add {folder}` failed. Fix that and run again; nothing is fetched twice.\n{said}"
        )
    note(Path(f"{folder}.dvc"))


def advice(folder: Path) -> list[str]:
    """What params.yaml should say, where the names leave no doubt."""
    from qlora.data.readers import files_of  # noqa: PLC0415 - pyarrow, which --help need not load

    try:
        data = files_of(folder)
    except InputError:
        return [f"no file in {folder} is one that prepare reads: convert it to parquet or jsonl"]
    chosen = {split: [path for path in data if PurePosixPath(path).name.startswith(split)] for split in ("train", "test")}
    if all(len(paths) == 1 for paths in chosen.values()):
        return ["set in params.yaml:", *(f"  data.{split}_file: {paths[0]}" for split, paths in chosen.items())]
    shown = [f"  {path}" for path in data[:LINES_SHOWN]] + ([f"  and {len(data) - LINES_SHOWN} more"] if len(data) > LINES_SHOWN else [])
    return [
        "set data.train_file and data.test_file in params.yaml, each to one file or to one folder (--files with --name makes one of some files):",
        *shown,
    ]


def parser() -> argparse.ArgumentParser:
    """Of this tool's command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("repo_id", help="ORG/NAME on the Hub")
    made.add_argument("--revision", default="main", help="commit, branch or tag of the Hub repository (default: main)")
    made.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="only these, such as 'data/*.parquet'; * matches / too")
    made.add_argument("--name", help="folder below data/raw; NAME of ORG/NAME without it")
    made.add_argument("--force", action="store_true", help="replace a folder that holds something else")
    return made


def main() -> None:
    arguments = parser().parse_args()
    name = arguments.name or arguments.repo_id.rpartition("/")[2]
    if not hub.NAME.fullmatch(name) or name.endswith((".dvc", ".partial")):
        raise InputError("fetch-name", f"{name!r} can't be a folder below {RAW}: letters, digits, '.', '_' and '-' only; give --name")
    if not Path(".dvc").is_dir():
        raise InputError("fetch-dvc", f"{Path.cwd()} is not a DVC repository: run from the repository's root")
    folder, commit = fetch(arguments.repo_id, arguments.revision, name, arguments.files, force=arguments.force)
    track(folder)
    ignored = RAW / ".gitignore"
    for_git = [f"{folder}.dvc", str(source_of(folder)), *([str(ignored)] if ignored.exists() else [])]
    command.say(f"{folder} holds {arguments.repo_id} at {commit}. Now `git add {' '.join(map(in_shell, for_git))}`, and")
    command.say("\n".join(advice(folder)))


if __name__ == "__main__":
    command.run(main)
