"""Proof of reproduction: stages built again by force in a clone of their own, and every output compared with what dvc.lock records.

Imports neither torch nor dvc.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qlora import params
from qlora.dvc_files import LOCK, Recorded, md5_of, recorded
from qlora.errors import InputError
from qlora.manifest import find_weights, read_manifest, verify

PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")
ENVIRONMENT = Path("metrics/environment.json")
JUDGED = ("metrics/baseline.json", "metrics/evaluate.json")
"""Metrics that must agree on another kind of machine: the overall measures in them. A category holds too few answers for that."""
RELATIVE = {"nll": 0.02, "perplexity": 0.02, "bits_per_byte": 0.02}
"""How far a likelihood may be off there, as a share of itself."""
ABSOLUTE = {"exact_match": 0.02, "stop_rate": 0.02, "token_f1": 0.02, "rouge_1": 0.02, "rouge_2": 0.02, "rouge_l": 0.02, "chrf": 2.0, "bleu": 2.0}
"""How far a score may be off: rounding flips single tokens, and with them answers."""


@dataclass(frozen=True)
class Stage:
    """One stage as dvc.lock records it, beside what dvc.yaml says now."""

    name: str
    locked: Mapping[str, Any]
    entries: Sequence[Recorded]
    command: str
    dependencies: frozenset[str]


def stages(names: Sequence[str] = ()) -> list[Stage]:
    """Those stages in the order of dvc.yaml; all of them without a name.

    Raises:
        InputError: dvc.lock does not record one, or there is no such stage.
    """
    entries = recorded()
    locked: Any = YAML(typ="safe", pure=True).load(LOCK)["stages"] if entries else {}
    pipeline = YAML(typ="safe", pure=True).load(PIPELINE)["stages"]
    if unknown := [name for name in names if name not in pipeline]:
        raise InputError("verify-stage", f"{unknown[0]!r} is no stage: {', '.join(pipeline)}")
    chosen = [name for name in pipeline if name in (names or pipeline)]
    if missing := [name for name in chosen if name not in locked]:
        raise InputError("verify-nothing", f"{LOCK} does not record {', '.join(missing)}: run `dvc repro` first")
    values: Any = YAML(typ="safe", pure=True).load(PARAMS)

    def path_of(dep: str) -> str:
        return re.sub(r"\$\{(\w+)\.(\w+)\}", lambda found: str(values.get(found[1], {}).get(found[2])), dep)

    return [
        Stage(
            name,
            locked[name],
            [entry for entry in entries if entry.stage == name],
            str(pipeline[name]["cmd"]),
            frozenset(map(path_of, pipeline[name]["deps"])),
        )
        for name in chosen
    ]


def changed_inputs(chosen: Sequence[Stage]) -> Iterator[str]:
    """What these stages would read or run now that is not what dvc.lock records, in words."""
    rebuilt = {entry.path for stage in chosen for entry in stage.entries if entry.is_output}
    values: Any = YAML(typ="safe", pure=True).load(PARAMS)
    for stage in chosen:
        if stage.command != stage.locked["cmd"]:
            yield f"{PIPELINE}: the command of {stage.name} is not the one that {LOCK} records"
        dependencies = {entry.path: entry.md5 for entry in stage.entries if not entry.is_output}
        for path in sorted(stage.dependencies ^ dependencies.keys()):
            yield f"{path}: a dependency of {stage.name} in {PIPELINE if path in stage.dependencies else LOCK} alone"
        for path, md5 in dependencies.items():
            if path not in rebuilt and (found := md5_of(Path(path)) if Path(path).exists() else "not there") != md5:
                yield f"{path}: {found}, {LOCK} says {md5} ({stage.name})"
        for place, locked in flat(stage.locked.get("params", {}).get(str(PARAMS), {})).items():
            if (found := _at(values, place)) != locked:
                yield f"{PARAMS}: {place} is {found!r}, {LOCK} says {locked!r} ({stage.name})"
    yield from _changed_base_model(chosen)


def _changed_base_model(chosen: Sequence[Stage]) -> Iterator[str]:
    name = params.load(PARAMS).base_model.name
    if any(f"models/base/{name}.json" in stage.dependencies for stage in chosen):
        try:
            manifest = read_manifest(Path(f"models/base/{name}.json"))
            verify(manifest, find_weights(name, manifest), memory=None)
        except InputError as error:
            yield error.message


def flat(record: Any, place: str = "") -> dict[str, Any]:
    """Values by their dotted place; lists whole."""
    if not isinstance(record, Mapping):
        return {place: record}
    return {path: value for name, part in record.items() for path, value in flat(part, f"{place}.{name}" if place else str(name)).items()}


def _at(values: Any, place: str) -> Any:
    for name in place.split("."):
        values = values.get(name, "not there") if isinstance(values, Mapping) else "not there"
    return values


def make_clone(folder: Path, chosen: Sequence[Stage]) -> None:
    """The working tree's files of Git, and what else these stages read, in a clone with a cache of its own."""
    subprocess.run(["git", "clone", "--quiet", ".", str(folder)], check=True)
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], stdout=subprocess.PIPE, check=True).stdout.decode()
    rebuilt = {entry.path for stage in chosen for entry in stage.entries if entry.is_output}
    read = {path for stage in chosen for path in stage.dependencies if path not in rebuilt}
    values = params.load(PARAMS)
    begun = {values.lora.init_adapter} if values.lora.init_adapter else set()
    for path in map(Path, sorted({*filter(None, listed.split("\0")), *read, *begun})):
        _place(path, folder / path)
    weights = folder / "models" / "base" / values.base_model.name
    if not weights.exists():
        weights.symlink_to(find_weights(values.base_model.name, read_manifest(weights.with_suffix(".json"))).resolve())
    # Whatever the machine or the user has configured: an empty cache, and so an empty run cache.
    (folder / ".dvc" / "config.local").write_text("[cache]\n    dir = cache\n", encoding="utf-8")


def _place(path: Path, target: Path) -> None:
    """What lies here, in place of what the last commit had there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True)
    elif path.exists() or path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)


def build(folder: Path, chosen: Sequence[Stage], *, everything: bool) -> list[str]:
    """Run these stages by force in the clone; the names of those that ran.

    Raises:
        InputError: one of them failed.
    """
    targets = [] if everything else ["--single-item", *(stage.name for stage in chosen)]
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [sys.executable, "-m", "dvc", "repro", "--force", *targets]
    ran = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                ran += re.findall(r"^Running stage '(\w+)'", line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise InputError("reproduction-failed", f"`dvc repro --force` ended with {process.returncode} in a clone of this repository: see above")
    return ran


def compare(folder: Path, chosen: Sequence[Stage], ran: Sequence[str], *, here: Path = Path()) -> dict[str, Any]:
    """reports/reproduction.json: what was built again in the clone beside what dvc.lock records.

    `verdict` is "identical": the same bytes; "equivalent": another kind of machine, as `causes` say, and the overall measures within the tolerances;
    else "different".
    """
    outputs = {
        entry.path: _compared(here / entry.path, folder / entry.path, entry.md5) for stage in chosen for entry in stage.entries if entry.is_output
    }
    noted, found = read_record(here / ENVIRONMENT), read_record(folder / ENVIRONMENT)
    causes = [f"{stage.name}: {cause}" for stage in chosen if stage.name in noted for cause in _unlike(noted[stage.name], found.get(stage.name, {}))]
    off = {name: rows for name in JUDGED if name in outputs and (rows := _beyond(here / name, folder / name))}
    is_whole = set(ran) == {stage.name for stage in chosen}
    if is_whole and all(output["identical"] for output in outputs.values()):
        verdict = "identical"
    else:
        verdict = "equivalent" if is_whole and causes and not off else "different"
    return {
        "verdict": verdict,
        "dvc_lock_sha256": hashlib.sha256((here / LOCK).read_bytes()).hexdigest(),
        "stages": list(ran),
        "inputs": len({entry.path for stage in chosen for entry in stage.entries if not entry.is_output}),
        "outputs": outputs,
        "environment": {stage.name: found.get(stage.name) for stage in chosen},
        "causes": causes,
        "beyond_tolerance": off,
        "tolerances": {"relative": RELATIVE, "absolute": ABSOLUTE},
    }


def _compared(ours: Path, theirs: Path, md5: str) -> dict[str, Any]:
    """One output: by its hash, and where it still lies here as it was recorded, byte by byte too."""
    found = md5_of(theirs) if theirs.exists() else None
    identical = found == md5
    if identical and ours.exists() and md5_of(ours) == md5:
        files = [path for path in theirs.rglob("*") if path.is_file()] if theirs.is_dir() else [theirs]
        identical = all(filecmp.cmp(path, ours / path.relative_to(theirs), shallow=False) for path in files)
    return {"md5": md5, "built_again": found, "identical": identical}


def read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = flat(before), flat(after)
    for place in sorted(old.keys() | new.keys()):
        if old.get(place) != new.get(place):
            yield f"{place} was {old.get(place)!r}, is {new.get(place)!r}"


def _beyond(ours: Path, theirs: Path) -> dict[str, list[float | None]]:
    """Overall measures that differ by more than the tolerance: before, after."""
    before, after = read_record(ours), read_record(theirs)
    off: dict[str, list[float | None]] = {}
    for name in (*RELATIVE, *ABSOLUTE):
        old, new = before.get(name), after.get(name)
        if old is None and new is None:
            continue
        if old is None or new is None or abs(new - old) > (abs(old) * RELATIVE[name] if name in RELATIVE else ABSOLUTE[name]):
            off[name] = [old, new]
    return off
