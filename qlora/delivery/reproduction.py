"""Proof of reproduction: stages built again by force in a clone of their own, and every output compared with what dvc.lock records.

Imports neither torch nor dvc.
"""

import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlora import params
from qlora.core.dvc_lock import LOCK, Recorded, flat, locked_stages, md5_of, outputs_of, params_values, pipeline_stages, recorded, resolved, value_at
from qlora.core.errors import InputError
from qlora.core.files import read_record
from qlora.core.hashing import project_root
from qlora.model.manifest import find_weights, read_manifest, verify
from qlora.runtime.git import is_tracked

PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")
ENVIRONMENT, FROZEN_ENVIRONMENT = Path("metrics/environment.json"), Path("reports/environment.json")
"""What the last runs on this machine noted, and what the model card froze."""
PATIENCE_SECONDS = 30
JUDGED = "reports/evaluation.json"
"""What must agree on another kind of machine: the overall measures of both models in it. A category holds too few answers for that."""
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
    params: frozenset[str]
    outputs: frozenset[str]


def stages(names: Sequence[str] = ()) -> list[Stage]:
    """Those stages in the order of dvc.yaml; all of them without a name.

    Raises:
        InputError: dvc.lock does not record one, or there is no such stage.
    """
    entries = recorded()
    locked, pipeline = locked_stages(), pipeline_stages()
    if unknown := [name for name in names if name not in pipeline]:
        raise InputError("verify-stage", f"{unknown[0]!r} is not a stage: {', '.join(pipeline)}")
    chosen = [name for name in pipeline if name in (names or pipeline)]
    if missing := [name for name in chosen if name not in locked]:
        raise InputError("verify-nothing", f"{LOCK} does not record {', '.join(missing)}: run `dvc repro` first")
    values = params_values()
    return [
        Stage(
            name,
            locked[name],
            [entry for entry in entries if entry.stage == name],
            str(pipeline[name]["cmd"]),
            frozenset(resolved(dep, values) for dep in pipeline[name]["deps"]),
            frozenset(pipeline[name].get("params", [])),
            frozenset(outputs_of(pipeline[name])),
        )
        for name in chosen
    ]


def changed_inputs(chosen: Sequence[Stage], *, all_here: bool = True) -> Iterator[str]:
    """What these stages would read or run now that is not what dvc.lock records, in words.

    Args:
        all_here: False where nothing is to run: raw data outside Git and weights may be elsewhere, and weights are hashed once only.
    """
    rebuilt = {entry.path for stage in chosen for entry in stage.entries if entry.is_output}
    values = params_values()
    for stage in chosen:
        yield from _changed_wiring(stage)
        for entry in stage.entries:
            path = Path(entry.path)
            if entry.is_output or entry.path in rebuilt or not (all_here or path.exists() or is_tracked(path)):
                continue
            if (found := md5_of(path) if path.exists() else "not there") != entry.md5:
                yield f"{path}: {found}, {LOCK} says {entry.md5} ({stage.name})"
        for place, locked in flat(stage.locked.get("params", {}).get(str(PARAMS), {})).items():
            if (found := value_at(values, place)) != locked:
                yield f"{PARAMS}: {place} is {found!r}, {LOCK} says {locked!r} ({stage.name})"
    yield from _changed_base_model(chosen, all_here=all_here)


def _changed_wiring(stage: Stage) -> Iterator[str]:
    """Where dvc.yaml and dvc.lock differ."""
    if stage.command != stage.locked.get("cmd"):
        yield f"{PIPELINE}: the command of {stage.name} is not the one that {LOCK} records"
    locked_params = stage.locked.get("params", {}).get(str(PARAMS), {}).keys()
    for kind, ours, theirs in (
        ("a dependency", stage.dependencies, {entry.path for entry in stage.entries if not entry.is_output}),
        ("an output", stage.outputs, {entry.path for entry in stage.entries if entry.is_output}),
        ("a param", stage.params, set(locked_params)),
    ):
        for name in sorted(ours ^ theirs):
            yield f"{name}: {kind} of {stage.name} in {PIPELINE if name in ours else LOCK} alone"


def _changed_base_model(chosen: Sequence[Stage], *, all_here: bool) -> Iterator[str]:
    name = params.load(PARAMS).base_model.name
    if any(f"models/base/{name}.json" in stage.dependencies for stage in chosen):
        try:
            manifest = read_manifest(Path(f"models/base/{name}.json"))
            verify(manifest, find_weights(name, manifest), memory=None if all_here else project_root() / ".dvc" / "tmp" / "verified.json")
        except InputError as error:
            if all_here or error.code != "base-model-missing":
                yield error.message


def make_clone(folder: Path, chosen: Sequence[Stage]) -> None:
    """The working tree's files of Git, and what else these stages read, in a clone with a cache of its own."""
    # Without a checkout: nothing is written through a link of the last commit, and what is deleted here is not there.
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", ".", str(folder)], check=True)
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], stdout=subprocess.PIPE, check=True).stdout.split(b"\0")
    for path in (Path(os.fsdecode(name)) for name in listed if name):
        _copy(path, folder / path)
    values = params.load(PARAMS)
    rebuilt = {entry.path for stage in chosen for entry in stage.entries if entry.is_output}
    read = {path for stage in chosen for path in stage.dependencies if path not in rebuilt} | {values.lora.init_adapter or ""}
    for path in map(Path, sorted(read - {""})):
        # An absolute path is read where it is.
        if not path.is_absolute():
            _copy(path, folder / path)
    name = values.base_model.name
    weights = folder / "models" / "base" / name
    if not weights.exists():
        weights.symlink_to(find_weights(name, read_manifest(weights.with_name(f"{name}.json"))).resolve())
    # Whatever the machine or the user has configured: an empty cache, and so an empty run cache.
    (folder / ".dvc" / "config.local").write_text("[cache]\n    dir = cache\n", encoding="utf-8")


def _copy(path: Path, target: Path) -> None:
    """What lies here, if it is not there already; a link becomes one to the same place."""
    if target.is_symlink() or target.is_file() or not (path.exists() or path.is_symlink()):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.resolve())
    elif path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copy2(path, target)


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
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                ran += re.findall(r"^Running stage '(\w+)'", line)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise InputError("reproduction-failed", f"`dvc repro --force` ended with {process.returncode} in a clone of this repository: see above")
    return ran


def _end(process: subprocess.Popen[str]) -> None:
    """Dvc and the stage that it runs, before the clone is removed under them."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def compare(folder: Path, chosen: Sequence[Stage], ran: Sequence[str], lock_sha256: str, *, here: Path = Path()) -> dict[str, Any]:
    """reports/reproduction.json: what was built again in the clone beside what dvc.lock records.

    `causes` are what the environment's notes say now and did not say then, by stage. `verdict` is

    - "identical": the same bytes;
    - "equivalent": other bytes of stages with a model on another kind of machine, and the overall measures within the tolerances;
    - "not judged": the same, but these stages do not measure what they made: `evaluate` is not among them, or a stage between is not;
    - "different": anything else.

    Args:
        lock_sha256: Of the dvc.lock that the stages were read from.
    """
    outputs = {entry.path: _compared(entry.path, folder, here, entry.md5) for stage in chosen for entry in stage.entries if entry.is_output}
    noted, found = read_environment(here), read_environment(folder)
    causes = {stage.name: list(_unlike(noted[stage.name], found.get(stage.name, {}))) for stage in chosen if stage.name in noted}
    is_judged = JUDGED in outputs and (here / JUDGED).exists() and outputs[JUDGED]["md5"] == md5_of(here / JUDGED)
    # Measured is what the chosen stages made only if no stage between them is left out: it would have read other bytes.
    names, different = {stage.name for stage in chosen}, {path for path, output in outputs.items() if not output["identical"]}
    is_judged = is_judged and not any(entry.path in different and entry.stage not in names for entry in recorded(here / LOCK) if not entry.is_output)
    off = _beyond(here / JUDGED, folder / JUDGED) if is_judged else {}
    record = {
        "dvc_lock_sha256": lock_sha256,
        "stages": list(ran),
        "inputs": len({entry.path for stage in chosen for entry in stage.entries if not entry.is_output}),
        "outputs": outputs,
        "environment": {stage.name: found.get(stage.name) for stage in chosen},
        "causes": {name: rows for name, rows in causes.items() if rows},
        "not_noted": [stage.name for stage in chosen if stage.name not in noted],
        "beyond_tolerance": {JUDGED: off} if off else {},
        "tolerances": {"relative": RELATIVE, "absolute": ABSOLUTE},
    }
    return {"verdict": _verdict(chosen, record, is_judged=is_judged), **record}


def _verdict(chosen: Sequence[Stage], record: Mapping[str, Any], *, is_judged: bool) -> str:
    outputs = record["outputs"]
    if set(record["stages"]) != {stage.name for stage in chosen} or any(output["built_again"] is None for output in outputs.values()):
        return "different"
    if all(output["identical"] for output in outputs.values()):
        return "identical"
    explained = False
    different = {path for path, output in outputs.items() if not output["identical"]}
    for stage in chosen:
        explained |= bool(record["causes"].get(stage.name))
        has_model = "device" in (record["environment"][stage.name] or {})
        reads_other_bytes = any(entry.path in different for entry in stage.entries if not entry.is_output)
        is_same = all(entry.path not in different for entry in stage.entries if entry.is_output)
        # What no model computes is the same on every machine, from the same inputs.
        if not is_same and not (explained and (has_model or reads_other_bytes)):
            return "different"
    if record["beyond_tolerance"]:
        return "different"
    return "equivalent" if is_judged else "not judged"


def _compared(path: str, folder: Path, here: Path, md5: str) -> dict[str, Any]:
    """One output: by its hash, and where it still lies here as it was recorded, byte by byte too."""
    ours, theirs = here / path, folder / path
    found = md5_of(theirs, folder) if theirs.exists() else None
    identical = found == md5
    if identical and ours.exists() and md5_of(ours, here) == md5:
        files = [file for file in theirs.rglob("*") if file.is_file()] if theirs.is_dir() else [theirs]
        identical = all(filecmp.cmp(file, ours / file.relative_to(theirs), shallow=False) for file in files)
    return {"md5": md5, "built_again": found, "identical": identical}


def read_environment(root: Path = Path()) -> dict[str, Any]:
    """What each stage noted of its environment: on this machine, or else as the model card froze it."""
    return {**read_record(root / FROZEN_ENVIRONMENT), **read_record(root / ENVIRONMENT)}


def _unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = flat(before), flat(after)
    for place in sorted(old.keys() | new.keys()):
        if old.get(place) != new.get(place):
            yield f"{place} was {old.get(place)!r}, is {new.get(place)!r}"


def _beyond(ours: Path, theirs: Path) -> dict[str, list[float | None]]:
    """Overall measures of either model that differ by more than the tolerance: before, after."""
    before, after = read_record(ours), read_record(theirs)
    off: dict[str, list[float | None]] = {}
    for side, name in product(("base", "tuned"), (*RELATIVE, *ABSOLUTE)):
        old, new = before.get(side, {}).get(name), after.get(side, {}).get(name)
        if old is None and new is None:
            continue
        if old is None or new is None or abs(new - old) > (abs(old) * RELATIVE[name] if name in RELATIVE else ABSOLUTE[name]):
            off[f"{side}.{name}"] = [old, new]
    return off
