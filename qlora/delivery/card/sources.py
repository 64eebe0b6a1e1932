"""What a model card is computed from, once it is certain that all of it belongs together."""

import hashlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qlora import params
from qlora.core.dvc_lock import LOCK, Recorded, md5_of, outputs_in_git
from qlora.core.errors import InputError, translate_errors
from qlora.core.files import read_record, require_file
from qlora.core.hashing import project_root, remembered, sha256_of
from qlora.core.text import in_shell
from qlora.delivery.reproduction import Stage, changed_inputs, stages
from qlora.model.manifest import Manifest, read_manifest
from qlora.params import Params
from qlora.params.section import Section

BY_HAND = Path("models/card.yaml")
ADAPTER = "models/adapter"
REPORTS = ("prepare", "train", "evaluation")
OPTIONAL = {"benchmark": "metrics/benchmark.json", "merge": "metrics/merge.json", "reproduction": "reports/reproduction.json"}


COMMITTED = (
    *("dvc.lock", "dvc.yaml", "params.yaml", "metrics", "stages", "qlora", "requirements.txt", "models/base"),
    *(f"reports/{name}.json" for name in REPORTS),
    OPTIONAL["reproduction"],
)
"""What the numbers of a card come from, besides the manifests of fetched data."""


class ByHand(Section):
    """models/card.yaml."""

    license: str
    license_file: str
    language: list[str]
    intended_use: str


@dataclass(frozen=True)
class Sources:
    """All that a card is computed from."""

    by_hand: ByHand
    params: Params
    stages: Sequence[Stage]
    base: Manifest
    base_license: str | None
    """As the Hub's card of the base model said when it was pinned."""
    raw: Mapping[str, Mapping[str, Any]]
    """data/raw/NAME.source.json of each dataset that tools.fetch brought."""
    reports: Mapping[str, Mapping[str, Any]]
    """reports/{prepare,train,evaluation}.json."""
    environment: Mapping[str, Mapping[str, Any]]
    found: Mapping[str, Mapping[str, Any]]
    """Those of OPTIONAL that are there and about this very adapter."""
    commit: str
    """The last one that changed dvc.lock."""

    @property
    def entries(self) -> list[Recorded]:
        return [entry for stage in self.stages for entry in stage.entries]


def read_sources(environment: Mapping[str, Mapping[str, Any]]) -> Sources:
    """Everything, once it is certain that it belongs together.

    Args:
        environment: What the stages noted, by stage.

    Raises:
        InputError: something was not run, not committed, or is not what dvc.lock records.
    """
    chosen = stages()
    values = params.load(Path("params.yaml"))
    raw = {str(path): read_record(path) for path in _raw_manifests(values)}
    wrong = [*changed_inputs(chosen, all_here=False), *_foreign(raw), *changed_outputs([entry for stage in chosen for entry in stage.entries])]
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise InputError("card-stale", f"{LOCK} records something else than is here: restore it, or run `dvc repro` and commit:\n{listed}")
    adapter = next(entry.md5 for stage in chosen for entry in stage.entries if entry.is_output and entry.path == ADAPTER)
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    found = {name: record for name, path in OPTIONAL.items() if (record := read_record(Path(path))) and _is_of_this(record, lock, adapter)}
    pinned = Path(f"models/base/{values.base_model.name}.json")
    commit = commit_of([*COMMITTED, *map(str, raw)])
    if unknown := [stage.name for stage in chosen if stage.name not in environment]:
        raise InputError(
            "card-environment",
            f"the environment of {', '.join(unknown)} was not noted here: write the card where the pipeline ran, or run `dvc repro --force` here",
        )
    return Sources(
        by_hand=read_by_hand(BY_HAND),
        params=values,
        stages=chosen,
        base=read_manifest(pinned),
        base_license=read_record(pinned).get("license"),
        raw=raw,
        reports={name: read_record(Path(f"reports/{name}.json")) for name in REPORTS},
        environment=environment,
        found=found,
        commit=commit,
    )


def changed_outputs(entries: Iterable[Recorded]) -> Iterator[str]:
    """Outputs that lie here and are not what dvc.lock records; those in DVC's cache or on a remote need not be here, those of Git must."""
    in_git = outputs_in_git()
    for entry in entries:
        path = Path(entry.path)
        if entry.is_output and (path.exists() or entry.path in in_git):
            found = md5_of(path) if path.exists() else "not there"
            if found != entry.md5:
                yield f"{path}: {found}, {LOCK} says {entry.md5}"


def _foreign(raw: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Fetched data that are not what their manifest says; those that are not here can't be looked at."""
    for path, record in raw.items():
        folder = Path(path.removesuffix(".source.json"))
        listed = {name: entry["sha256"] for name, entry in record["files"].items()}
        if not folder.exists():
            continue
        memory = project_root() / ".dvc" / "tmp" / "inputs_sha256.json"
        found = {file.relative_to(folder).as_posix(): remembered(file, sha256_of, memory) for file in folder.rglob("*") if file.is_file()}
        for name in sorted(listed.keys() | found.keys()):
            if listed.get(name) != found.get(name):
                yield f"{folder / name}: not what {path} says was fetched: fetch it again, or remove {path} if these are data of your own"


def _is_of_this(record: Mapping[str, Any], lock: str, adapter: str) -> bool:
    """Whether a reproduction is of this dvc.lock, a benchmark or merge of the adapter that it records."""
    if "ran_on" in record:
        return bool(record["ran_on"].get("adapter", {}).get("dvc_md5") == adapter)
    return bool(record.get("dvc_lock_sha256") == lock)


def _raw_manifests(values: Params) -> list[Path]:
    """data/raw/NAME.source.json of what the raw paths lie in."""
    folders = {Path(*Path(path).parts[:3]) for path in (values.data.train_file, values.data.test_file)}
    return sorted(path for folder in folders if (path := folder.with_name(f"{folder.name}.source.json")).is_file())


def commit_of(paths: Sequence[str]) -> str:
    """The commit that changed dvc.lock last.

    Raises:
        InputError: one of the paths differs from what is committed, or the history is not here.
    """
    if changed := _git("status", "--porcelain", "--", *paths):
        raise InputError("card-uncommitted", f"a card names the commit that its numbers come from: commit these first\n{changed}")
    if _git("rev-parse", "--is-shallow-repository") == "true":
        raise InputError("card-shallow", "this clone lacks the history that says when dvc.lock was committed: `git fetch --unshallow`")
    if not (commit := _git("log", "-1", "--format=%H", "--", str(LOCK))):
        raise InputError("card-uncommitted", f"{LOCK} is not committed: commit it first")
    return commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise InputError("card-uncommitted", f"`git {' '.join(arguments[:2])}` failed: {done.stderr.strip()}")
    return done.stdout.rstrip()


def read_by_hand(path: Path) -> ByHand:
    """Raises InputError when the file is missing or not of this form."""
    with translate_errors("card-by-hand", path, f"can't be read as the fields {', '.join(ByHand.model_fields)}", f"see `git diff {in_shell(path)}`"):
        require_file(path)
        return ByHand.model_validate(YAML(typ="safe", pure=True).load(path))
