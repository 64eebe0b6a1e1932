"""Pin a base model: write models/base/NAME.json, the sha256 of every file that loading it may read.

    python -m tools.pin NAME --path DIR                                  weights on this machine; links models/base/NAME to them
    python -m tools.pin NAME --repo-id ORG/NAME --revision <40 hex>      weights of the Hugging Face Hub at one commit, downloaded

Then set base_model.name to NAME. The manifest goes into Git, the weights stay where they are.
"""

import argparse
import json
from glob import escape
from pathlib import Path
from typing import Any

from qlora import command, hub
from qlora.errors import InputError, MachineError
from qlora.manifest import LOADED_SUFFIXES, make_manifest
from qlora.records import write_json

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
        InputError: the revision is a moving name, or the Hub does not give that repository at that commit.
        MachineError: the Hub can't be reached, or sends what it does not list.
    """
    commit = hub.read_commit(repo_id, revision, "model")
    files = [file for file in commit.files if "/" not in file.path and Path(file.path).suffix in LOADED_SUFFIXES]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise InputError("base-model-no-weights", f"{repo_id} holds no .safetensors file: only safetensors weights are loaded")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second that --path need not pay
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    blobs = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    for file in files:
        hub.download(commit, file, blobs / file.digest)
    # The cache's own library gives the contents their names; it finds all of them there.
    with hub.told(repo_id, revision):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[escape(file.path) for file in files], endpoint=hub.endpoint()))
    for file in files:
        path = folder / file.path
        if not (path.exists() and path.samefile(blobs / file.digest)) and not hub.holds(path, file):
            raise MachineError("hub-damaged", f"{path} is not what the Hub lists: remove {folder} and run again")
    return folder, commit


def write_manifest(path: Path, record: dict[str, Any]) -> None:
    """Write it, unless one that says the same but for the licence lies there: the stages depend on its bytes."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = None
    if not isinstance(known, dict) or {**known, "license": None} != {**record, "license": None}:
        write_json(path, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what base_model.name will say")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", type=Path, help="folder with the weights")
    source.add_argument("--repo-id", help="ORG/NAME on the Hub")
    parser.add_argument("--revision", help="commit of the Hub repository, 40 hex digits")
    arguments = parser.parse_args()
    if not hub.NAME.fullmatch(arguments.name):
        raise InputError("pin-name", f"{arguments.name!r} can't be a base model's name: letters, digits, '.', '_' and '-' only")
    weights, commit = (arguments.path, None) if arguments.path else download(arguments.repo_id, arguments.revision or "")
    manifest = make_manifest(weights, arguments.repo_id, arguments.revision)
    link_weights(arguments.name, weights)
    path = FOLDER / f"{arguments.name}.json"
    write_manifest(path, {**manifest.record(), **({"license": commit.license} if commit and commit.license else {})})
    total = sum(entry["bytes"] for entry in manifest.files.values())
    print(f"{path}: {len(manifest.files)} files, {total / 1e6:,.1f} MB. Commit it, and set base_model.name: {arguments.name}")


if __name__ == "__main__":
    command.run(main)
