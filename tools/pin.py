"""Pin a base model: write models/base/NAME.json, the sha256 of every file that loading it may read.

    python -m tools.pin NAME --path DIR                                  weights on this machine; links models/base/NAME to them
    python -m tools.pin NAME --repo-id ORG/NAME --revision main          weights of the Hugging Face Hub, downloaded

A commit, branch or tag is looked up once, and the commit is what is written. Then set base_model.name to NAME. The manifest goes into Git, the
weights stay where they are.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.core.errors import InputError, MachineError, translate_errors
from qlora.core.files import read_record
from qlora.delivery import hub
from qlora.delivery.hub import HubFile
from qlora.delivery.ownership import write_own_json
from qlora.model.manifest import LOADED_SUFFIXES, Manifest, check_vocabulary, loadable_files, make_manifest
from qlora.runtime import command
from qlora.runtime.locks import try_lock

FOLDER = Path("models/base")


def link_weights(name: str, source: Path) -> None:
    """Make models/base/NAME lead to the folder; a folder that lies there itself stays as it is."""
    link, target = FOLDER / name, source.resolve()
    if link.is_symlink():
        if link.resolve() == target:
            return
        link.unlink()
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target, target_is_directory=True)
    elif not link.samefile(target):
        raise InputError("pin-occupied", f"{link} is a folder of its own: move it away, or pin it with --path {link}")


def download(repo_id: str, revision: str) -> tuple[Path, hub.Commit]:
    """The folder of one commit in the Hub cache, whole and as the Hub lists it, and that commit.

    Raises:
        InputError: the Hub does not give that repository at that revision, or its folder holds other files too.
        MachineError: the Hub can't be reached, or sends what it does not list; or another process downloads the same repository.
    """
    commit = hub.read_commit(repo_id, revision, "model")
    files = loaded(commit)
    if not any(file.path.endswith(".safetensors") for file in files):
        raise InputError("base-model-no-weights", f"{repo_id} holds no .safetensors file: only safetensors weights are loaded")
    hub.require_distinct(repo_id, files)
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415 - half a second that --path need not pay

    cached = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    blobs, folder = cached / "blobs", cached / "snapshots" / commit.revision
    with _only_here(commit, cached):
        for file in files:
            hub.download(commit, file, blobs / file.digest)
            _name(folder / file.path, blobs / file.digest)
    for file in files:
        path = folder / file.path
        if not (path.exists() and path.samefile(blobs / file.digest)) and not hub.holds(path, file):
            raise MachineError("hub-damaged", f"{path} is not what the Hub lists: remove {folder} and run again")
    foreign = sorted({path.name for path in loadable_files(folder)} - {file.path for file in files})
    if foreign:
        raise InputError(
            "pin-foreign",
            f"{folder} holds {', '.join(foreign)}, which {repo_id} does not list at {commit.revision}: remove them, or pin a copy with --path",
        )
    return folder, commit


def loaded(commit: hub.Commit) -> list[HubFile]:
    """The commit's files that loading the model may read."""
    return [file for file in commit.files if "/" not in file.path and Path(file.path).suffix in LOADED_SUFFIXES]


@contextmanager
def _only_here(commit: hub.Commit, cached: Path) -> Iterator[None]:
    """Two processes would append to one half-written file."""
    # Beside the cache's own locks, which the same repository has there; like those, the file stays.
    path = cached.parent / ".locks" / cached.name / "pin.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(path)
    if lock is None:
        raise MachineError("pin-running", f"another process pins {commit.repo_id} (it holds {path}): wait for it, or end it")
    with lock:
        yield


def _name(path: Path, blob: Path) -> None:
    """Give a content its name, as huggingface_hub lays out its cache; what has the name already stays.

    snapshot_download would do it after it asked the Hub about each file once more, and make a file of any name that a header there says.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))


def require_listed(manifest: Manifest, commit: hub.Commit) -> None:
    """Compare what was hashed with what the Hub lists: between the download and the hashing the folder could change.

    Raises:
        MachineError: other files, or a file of another size or, in LFS, another sha256.
    """
    found = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.files.items()}
    # Of a file outside LFS the Hub lists no sha256: its Git sum was compared in `download`.
    listed = {file.path: (file.size, file.digest if file.is_lfs else found.get(file.path, (0, ""))[1]) for file in loaded(commit)}
    wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    if wrong:
        raise MachineError("hub-damaged", f"{', '.join(wrong)} of {commit.repo_id} changed while it was hashed: run again when nothing writes there")


def require_loadable(folder: Path) -> str | None:
    """Open all that the stages will: each file of weights as far as its header, the config, the tokenizer and its chat template.

    Returns:
        Why the chat template can't be used as it is, with what to set; None where it can.

    Raises:
        InputError: one of them can't be loaded, or the template does not end.
    """
    from safetensors import safe_open  # noqa: PLC0415 - seconds that --help need not take

    from qlora.model.chat_template import ChatTemplate  # noqa: PLC0415
    from qlora.model.config import load_config, load_tokenizer  # noqa: PLC0415

    for path in loadable_files(folder):
        if path.suffix == ".safetensors":
            with translate_errors("base-model-unloadable", path, "is damaged", "download it again"), safe_open(path, framework="np") as weights:
                weights.keys()
    load_config(folder)
    tokenizer = load_tokenizer(folder)
    try:
        ChatTemplate.saved(tokenizer)
    except InputError as error:
        if error.code == "chat-endless":
            raise
        return error.message
    return None


def write_manifest(path: Path, record: dict[str, Any]) -> None:
    """Write it, unless one that says the same but for the licence lies there: the stages depend on its bytes."""
    known = read_record(path)
    if not known or {**known, "license": None} != {**record, "license": None}:
        write_own_json(path, record)


def parser() -> argparse.ArgumentParser:
    """Of this tool's command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("name", help="what base_model.name will say")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", type=Path, help="folder with the weights")
    source.add_argument("--repo-id", help="ORG/NAME on the Hub")
    made.add_argument("--revision", default="main", help="commit, branch or tag of the Hub repository (default: main)")
    return made


def main() -> None:
    arguments = parser().parse_args()
    if not hub.NAME.fullmatch(arguments.name):
        raise InputError("pin-name", f"{arguments.name!r} can't be a base model's name: letters, digits, '.', '_' and '-' only")
    weights, commit = (arguments.path, None) if arguments.path else download(arguments.repo_id, arguments.revision)
    manifest = make_manifest(weights, arguments.repo_id, commit.revision if commit else None)
    check_vocabulary(weights)
    problem = require_loadable(weights)
    if commit:
        require_listed(manifest, commit)
    link_weights(arguments.name, weights)
    path = FOLDER / f"{arguments.name}.json"
    write_manifest(path, {**manifest.record(), **({"license": commit.license} if commit and commit.license else {})})
    total = sum(entry["bytes"] for entry in manifest.files.values())
    command.say(f"{path}: {len(manifest.files)} files, {total / 1e6:,.1f} MB. Commit it, and set base_model.name: {arguments.name}")
    if problem:
        command.say(f"With chat.template: model it can't be trained: {problem}")


if __name__ == "__main__":
    command.run(main)
