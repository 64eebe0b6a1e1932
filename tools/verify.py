"""Is everything as it was made? Hashes every output, its objects in DVC's cache, the raw data and the base model again.

    python -m tools.verify            names every difference; exit code 2 if there is one

DVC itself trusts what it hashed once: a damaged object of its cache is checked out, and `dvc status` calls it up to date.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from qlora import command, params
from qlora.dvc_files import Recorded, cached, md5_of, objects, outputs_in_git, recorded
from qlora.errors import InputError
from qlora.manifest import find_weights, read_manifest, verify

MANIFESTS = Path("models/base")


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
    mend = f"`dvc checkout --force {path}` or `git checkout -- {path}` brings it back, `dvc repro --force {entry.stage}` makes it again"
    return f"has the md5 {found}, dvc.lock says {entry.md5}: {mend}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    count, wrong = 0, []
    for place, difference in differences():
        count += 1
        if difference:
            wrong.append(f"{place} {difference}")
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise InputError("verify-differs", f"{len(wrong)} of {count} are not as they were made:\n{listed}")
    print(f"{count} outputs, inputs, cache objects and models are as they were made")


if __name__ == "__main__":
    command.run(main)
