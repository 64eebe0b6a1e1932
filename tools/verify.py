"""Is everything as it was made? And can it be made again?

    python -m tools.verify                  hashes every output, its objects in DVC's cache, raw data and base model; exit code 2 if one differs
    python -m tools.verify --rerun          builds all stages again by force in a clone with an empty cache and compares every byte
    python -m tools.verify --rerun train    one stage or several, from what the stages before them made

DVC itself trusts what it hashed once: a damaged object of its cache is checked out, and `dvc status` calls it up to date. --rerun first names
each input, param and module that is not what dvc.lock records, and then builds nothing. What it finds goes to reports/reproduction.json; on
another kind of machine, other bytes are accepted when the overall measures are within the tolerances that stand there.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora import params
from qlora.core.dvc_lock import LOCK, Recorded, cached, md5_of, objects, outputs_in_git, recorded
from qlora.core.errors import InputError
from qlora.core.hashing import sha256_of
from qlora.delivery import reproduction
from qlora.delivery.ownership import require_replaceable, write_own_json
from qlora.model.manifest import find_weights, read_manifest, verify
from qlora.runtime import command

MANIFESTS = Path("models/base")
REPRODUCTION = Path("reports/reproduction.json")


def differences() -> Iterator[tuple[str, str | None]]:
    """(what was looked at, what is wrong with it or None), one after the other."""
    # Code is Git's to look after.
    entries = [
        entry for entry in dict.fromkeys(recorded()) if entry.is_output or not entry.path.startswith(("qlora/", "stages/", "requirements.txt"))
    ]
    if not entries:
        raise InputError("verify-nothing", "dvc.lock records nothing: run `dvc repro` first")
    made = {entry.path for entry in entries if entry.is_output}
    for entry in entries:
        if entry.is_output or entry.path not in made:
            yield entry.path, _file_difference(entry)
    looked_at: set[str] = set()
    in_git = outputs_in_git()
    for entry in entries:
        if not entry.is_output or entry.path in in_git:
            continue
        for md5 in objects(entry.md5):
            if md5 not in looked_at:
                looked_at.add(md5)
                yield str(cached(md5)), _object_difference(md5, entry.path)
    yield from _base_model()


def _file_difference(entry: Recorded) -> str | None:
    path = Path(entry.path)
    if not path.exists():
        return f"is missing: `dvc checkout {path}` if the cache has it, else `dvc repro`"
    found = md5_of(path)
    if found == entry.md5:
        return None
    fix = f"`dvc checkout --force {path}` or `git checkout -- {path}` restores it, `dvc repro --force {entry.stage}` makes it again"
    return f"has the md5 {found}, dvc.lock says {entry.md5}: {fix}"


def _object_difference(md5: str, output: str) -> str | None:
    path = cached(md5)
    if not path.is_file():
        return f"is missing in the cache, part of {output}: `dvc commit --force` while {output} is there, `dvc fetch` or `dvc repro --force` else"
    found = md5_of(path) + (".dir" if md5.endswith(".dir") else "")
    if found == md5:
        return None
    return f"has the md5 {found}, its name says {md5}, part of {output}: remove it, then `dvc fetch` or `dvc repro --force`"


def _base_model() -> Iterator[tuple[str, str | None]]:
    name = params.load(Path("params.yaml")).base_model.name
    try:
        manifest = read_manifest(MANIFESTS / f"{name}.json")
        verify(manifest, find_weights(name, manifest), memory=None)
    except InputError as error:
        yield f"base model {name}", error.message
    else:
        yield f"base model {name}, {len(manifest.files)} files", None


def rerun(names: Sequence[str]) -> None:
    """Build these stages again and say how it compares.

    Raises:
        InputError: an input is not what dvc.lock records, a stage failed, or an output is not what it was.
    """
    require_replaceable(REPRODUCTION, own=True)
    lock = sha256_of(LOCK) if LOCK.is_file() else ""
    chosen = reproduction.stages(names)
    if changed := list(reproduction.changed_inputs(chosen)):
        write_own_json(REPRODUCTION, {"verdict": "inputs changed", "causes": changed})
        listed = "\n".join(f"  {line}" for line in changed)
        raise InputError(
            "reproduction-inputs", f"nothing was built: {LOCK} records other inputs than are here. Restore them, or run `dvc repro`:\n{listed}"
        )
    with tempfile.TemporaryDirectory(prefix="reproduction-") as place:
        folder = Path(place) / "clone"
        reproduction.make_clone(folder, chosen)
        ran = reproduction.build(folder, chosen, everything=not names)
        record = reproduction.compare(folder, chosen, ran, lock)
    write_own_json(REPRODUCTION, record)
    outputs = record["outputs"]
    same = sum(output["identical"] for output in outputs.values())
    command.say(f"\n{len(ran)} of {len(chosen)} stages ran, {same} of {len(outputs)} outputs are the same byte for byte ({REPRODUCTION})")
    for stage, causes in record["causes"].items():
        command.say(f"  another environment of {stage}: {'; '.join(causes)}")
    if record["verdict"] == "equivalent":
        command.say("the overall measures agree within the tolerances: equivalent on another kind of machine")
    if record["verdict"] in ("different", "not judged"):
        raise InputError("reproduction-differs", "\n".join(_unlike(record)))


def _unlike(record: dict[str, Any]) -> Iterator[str]:
    if record["verdict"] == "not judged":
        yield "another environment gave other bytes, and these stages do not measure how much that matters: rerun all of them"
    else:
        yield "the same inputs gave other outputs" + (
            ""
            if record["causes"]
            else f"; the environment of {', '.join(record['not_noted'])} was not noted here, so nothing can explain it (tools.card keeps it)"
            if record["not_noted"]
            else ", and the environment is the same: something outside the hash chain"
        )
    for path, output in record["outputs"].items():
        if not output["identical"]:
            yield f"  {path}: {output['built_again']}, {LOCK} says {output['md5']}"
    for path, measures in record["beyond_tolerance"].items():
        for name, (before, after) in measures.items():
            yield f"  {path}: {name} was {before}, is {after}: beyond the tolerance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rerun", nargs="*", metavar="STAGE", help="build these stages again; without a name all")
    arguments = parser.parse_args()
    if arguments.rerun is not None:
        rerun(arguments.rerun)
        return
    count, wrong = 0, []
    for place, difference in differences():
        count += 1
        if difference:
            wrong.append(f"{place} {difference}")
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise InputError("verify-differs", f"{len(wrong)} of {count} are not as they were made:\n{listed}")
    command.say(f"{count} outputs, inputs, cache objects and models are as they were made")


if __name__ == "__main__":
    command.run(main)
