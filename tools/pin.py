"""Pin a base model: write models/base/NAME.json, the sha256 of every file that loading it may read.

    python -m tools.pin NAME --path DIR                                  weights on this machine; links models/base/NAME to them
    python -m tools.pin NAME --repo-id ORG/NAME --revision <40 hex>      weights of the Hugging Face Hub at one commit, downloaded

Then set base_model.name to NAME. The manifest goes into Git, the weights stay where they are.
"""

import argparse
import re
from pathlib import Path

from qlora import command
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


def download(repo_id: str, revision: str) -> Path:
    """The folder of one commit in the Hub cache, downloaded where it is not there yet.

    Raises:
        InputError: the revision is a moving name, or the Hub does not give that repository at that commit.
        MachineError: the Hub can't be reached.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            "pin-revision",
            f"--revision {revision!r} is not a commit: a branch or tag can move, give the 40 hex digits that the repository's page shows",
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second that --path need not pay
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[f"*{suffix}" for suffix in LOADED_SUFFIXES]))
    except GatedRepoError as error:
        raise InputError("hub-gated", f"{repo_id} is gated: accept its terms on its page and set HF_TOKEN ({error})") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError("hub-not-found", f"the Hub has no {repo_id} at {revision} that this account may read: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineError("hub-unreachable", f"{repo_id} can't be downloaded: {error}. Try again; what arrived is kept.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what base_model.name will say")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", type=Path, help="folder with the weights")
    source.add_argument("--repo-id", help="ORG/NAME on the Hub")
    parser.add_argument("--revision", help="commit of the Hub repository, 40 hex digits")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arguments.name):
        raise InputError("pin-name", f"{arguments.name!r} can't be a base model's name: letters, digits, '.', '_' and '-' only")
    weights = arguments.path or download(arguments.repo_id, arguments.revision or "")
    manifest = make_manifest(weights, arguments.repo_id, arguments.revision)
    link_weights(arguments.name, weights)
    path = FOLDER / f"{arguments.name}.json"
    write_json(path, manifest.record())
    total = sum(entry["bytes"] for entry in manifest.files.values())
    print(f"{path}: {len(manifest.files)} files, {total / 1e6:,.1f} MB. Commit it, and set base_model.name: {arguments.name}")


if __name__ == "__main__":
    command.run(main)
