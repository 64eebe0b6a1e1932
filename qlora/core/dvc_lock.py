"""What DVC has recorded: the hashes of dvc.lock and the objects of its cache. Imports no dvc, which takes a second."""

import configparser
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
from ruamel.yaml import YAML

from qlora.core.errors import InputError, translate_errors
from qlora.core.files import READ_BYTES, require_file
from qlora.core.hashing import project_root, remembered

LOCK = Path("dvc.lock")
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
"""A file's, or that of a list of a folder's files. It names a file of the cache."""


class Recorded(NamedTuple):
    """One path of one stage in dvc.lock."""

    stage: str
    path: str
    md5: str
    is_output: bool


def locked_stages(lock: Path = LOCK) -> dict[str, dict[str, Any]]:
    """What dvc.lock says of each stage, as far as it says it: `cmd`, `deps` and `outs`, lists of entries with path and md5, and `params`,
    {file: {name: value}}; nothing without a dvc.lock.

    Raises:
        InputError: it is not a lock file.
    """
    way_out = f"`cp {lock} .dvc/tmp/ && git checkout HEAD -- {lock}`"
    with translate_errors("lock-damaged", lock, "is not a lock file of DVC", way_out):
        require_file(lock)
        record: Any = _safe_yaml().load(lock) if lock.exists() else None
        return {name: _locked(stage) for name, stage in (record or {}).get("stages", {}).items()}


def _locked(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The stage, once its form is certain."""
    for entry in (entry for kind in ("deps", "outs") for entry in stage.get(kind, [])):
        if not (isinstance(entry["path"], str) and MD5.fullmatch(entry["md5"])):
            raise ValueError(f"{entry} has no path or no md5")
    return {**stage, "params": {file: dict(values) for file, values in stage.get("params", {}).items()}}


def recorded(lock: Path = LOCK) -> list[Recorded]:
    """Every dependency and output of every stage; nothing without a dvc.lock.

    Raises:
        InputError: it is not a lock file.
    """
    return [
        Recorded(name, entry["path"], entry["md5"], kind == "outs")
        for name, stage in locked_stages(lock).items()
        for kind in ("deps", "outs")
        for entry in stage.get(kind, [])
    ]


def pipeline_stages(pipeline: Path = Path("dvc.yaml")) -> dict[str, dict[str, Any]]:
    """What dvc.yaml says of each stage, with the paths of `deps`, and of `params` those of params.yaml; none of those that DVC makes of a list.

    Raises:
        InputError: it is not a pipeline of DVC.
    """
    with translate_errors("pipeline-damaged", pipeline, "is not a pipeline of DVC", f"see `git diff {pipeline}`"):
        require_file(pipeline)
        stages: Mapping[str, Mapping[str, Any]] = _safe_yaml().load(pipeline)["stages"]
        return {name: _wired(stage) for name, stage in stages.items() if not {"foreach", "matrix"} & stage.keys()}


def _wired(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The stage, once its form is certain; DVC takes an entry alone, or with options of its own."""
    if not all(isinstance(options, Mapping) for options in outputs_of(stage).values()):
        raise ValueError("an output has no options")
    deps = [dep if isinstance(dep, str) else next(iter(dep)) for dep in stage.get("deps", [])]
    return {"cmd": "", **stage, "deps": deps, "params": [name for name in stage.get("params", []) if isinstance(name, str)]}


def params_values(params: Path = Path("params.yaml")) -> dict[str, dict[str, Any]]:
    """The values of params.yaml as DVC reads them, not checked.

    Raises:
        InputError: it does not hold sections with keys and values.
    """
    with translate_errors("params-syntax", params, "does not hold sections with keys and values", f"see `git diff {params}`"):
        require_file(params)
        return {name: dict(section) for name, section in _safe_yaml().load(params).items()}


def flat(record: Any, place: str = "") -> dict[str, Any]:
    """Values by their dotted place; lists whole."""
    if not isinstance(record, Mapping):
        return {place: record}
    return {path: value for name, part in record.items() for path, value in flat(part, f"{place}.{name}" if place else str(name)).items()}


def value_at(values: Any, place: str) -> Any:
    """The value at a dotted place; "not there" where there is none."""
    for name in place.split("."):
        values = values.get(name, "not there") if isinstance(values, Mapping) else "not there"
    return values


def _safe_yaml() -> YAML:
    # Not the scanner in C, that DVC reads with: deeply nested brackets end the process there.
    return YAML(typ="safe", pure=True)


def recorded_outputs() -> dict[str, str]:
    """md5 of every output of every stage by its path."""
    return {entry.path: entry.md5 for entry in recorded() if entry.is_output}


def dependencies_of(stage: str, pipeline: Path = Path("dvc.yaml"), params: Path = Path("params.yaml")) -> list[Path]:
    """Files and folders that dvc.yaml lists for a stage, with `${section.key}` of params.yaml in place."""
    values = params_values(params)
    return [Path(resolved(entry, values)) for entry in pipeline_stages(pipeline)[stage]["deps"]]


def resolved(entry: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    """An entry of dvc.yaml with the values of params.yaml in place of its `${section.key}`.

    Raises:
        InputError: params.yaml has no such value.
    """
    with translate_errors("params-invalid", "params.yaml", f"lacks a value of {entry} in dvc.yaml", "see `git diff params.yaml dvc.yaml`"):
        return re.sub(r"\$\{(\w+)\.(\w+)\}", lambda found: str(values[found[1]][found[2]]), entry)


def outputs_of(stage: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Options of each output of a stage of dvc.yaml, plain, metric or plot, by its path."""
    listed = (entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, []))
    return dict((entry, {}) if isinstance(entry, str) else next(iter(entry.items())) for entry in listed)


def outputs_in_git(pipeline: Path = Path("dvc.yaml")) -> set[str]:
    """Outputs that dvc.yaml keeps out of the cache."""
    return {path for stage in pipeline_stages(pipeline).values() for path, options in outputs_of(stage).items() if options.get("cache") is False}


def md5_of(path: Path, root: Path = Path()) -> str:
    """As DVC hashes: a file by its bytes, a folder by the list of its files and their hashes.

    Args:
        root: Of the repository that the path lies in, as the path has it: its .dvcignore counts.
    """
    if path.is_dir():
        return hashlib.md5(listing(path, root)).hexdigest() + ".dir"
    require_file(path)
    digest = hashlib.md5()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def listing(folder: Path, root: Path = Path()) -> bytes:
    """The object that the cache holds for a folder: its files, but those of .dvcignore."""
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - of use for folders alone

    require_file(root / ".dvcignore")
    patterns = (root / ".dvcignore").read_text(encoding="utf-8").splitlines() if (root / ".dvcignore").exists() else []
    ignored = GitIgnoreSpec.from_lines(patterns)
    base = root if folder.is_relative_to(root) else folder
    files = [path for path in folder.rglob("*") if path.is_file() and not ignored.match_file(path.relative_to(base))]
    entries = [{"md5": md5_of(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True).encode()


def unfinished_folder(kind: str, stage: str, values: Mapping[str, Any], inputs: Iterable[Path]) -> Path:
    """Where a stage keeps unfinished work of this kind: named by values, inputs, and the code and packages that dvc.yaml lists for the stage."""
    code = [path for path in dependencies_of(stage) if path.parts[0] in ("stages", "qlora", "requirements.txt")]
    return project_root() / ".dvc" / "tmp" / kind / fingerprint(values, [*inputs, *code])


def fingerprint(values: Mapping[str, Any], paths: Iterable[Path]) -> str:
    """16 hex digits over values and the content of files and folders, hashed as DVC hashes them."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in paths:
        digest.update(f"{path.name} {md5_of(path)}".encode())
    return digest.hexdigest()[:16]


def require_recorded(paths: Iterable[Path]) -> None:
    """What a stage reads is what another stage made. DVC itself looks no further than at a file's time and size.

    Raises:
        InputError: a file is not the output that dvc.lock records; one that it does not record is no matter.
    """
    outputs = recorded_outputs()
    memory = project_root() / ".dvc" / "tmp" / "inputs.json"
    for path in paths:
        if str(path) in outputs and path.exists() and (found := remembered(path, md5_of, memory)) != outputs[str(path)]:
            raise InputError(
                "input-changed",
                f"{path} has the md5 {found}, dvc.lock says {outputs[str(path)]}: it was changed after it was made. "
                f"`dvc checkout --force {path}` restores it, `dvc repro` makes it again.",
            )


def cache_folder() -> Path:
    """Where DVC keeps its objects: .dvc/cache, or what `cache.dir` says in the configuration of machine, user or repository."""
    root = project_root() / ".dvc"
    machine = os.environ.get("DVC_SYSTEM_CONFIG_DIR", platformdirs.site_config_dir("dvc", "iterative"))
    user = os.environ.get("DVC_GLOBAL_CONFIG_DIR", platformdirs.user_config_dir("dvc", "iterative"))
    settings = configparser.RawConfigParser()
    files = [Path(machine) / "config", Path(user) / "config", root / "config", root / "config.local"]
    with translate_errors("dvc-config", ", ".join(str(path) for path in files if path.exists()), "can't be read", "fix it"):
        for path in files:
            require_file(path)
        settings.read(files, encoding="utf-8")
    return root / settings.get("cache", "dir", fallback="cache").strip("\"'")


def cached(md5: str) -> Path:
    """Where the cache holds an object, or would."""
    return cache_folder() / "files" / "md5" / md5[:2] / md5[2:]


def objects(md5: str) -> Iterator[str]:
    """An output's objects: its own, and for a folder those of its files, as far as the cache can tell."""
    yield md5
    if md5.endswith(".dir") and cached(md5).is_file():
        try:
            yield from (entry["md5"] for entry in json.loads(cached(md5).read_bytes()) if MD5.fullmatch(entry["md5"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return


def is_cached(path: Path) -> bool:
    """Whether the cache holds all of what lies there."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return all(cached(md5_of(part)).is_file() for part in (path, *files))


def is_committed(path: Path, output: str, outputs: Mapping[str, str]) -> bool:
    """Whether DVC has taken what lies at `path` as `output`: dvc.lock says so, or, for an experiment in a copy, the cache holds it."""
    return outputs.get(output) == md5_of(path) or is_cached(path)
