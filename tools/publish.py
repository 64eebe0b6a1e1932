"""Publish the adapter on the Hugging Face Hub: its files, the model card and the licence, nothing else, in one commit.

    python -m tools.publish --repo-id ORG/NAME --dry-run      what would be uploaded, with sizes and sha256; asks no network and no token
    python -m tools.publish --repo-id ORG/NAME --private      a repository that only its owner sees, made where there is none

Refuses an adapter that is not what dvc.lock records, a model card that is not what `python -m tools.card` computes, and any file in models/adapter
that is not known to be safe. HF_TOKEN must allow writing. What else lies in the repository on the Hub stays there.
"""

import argparse
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from ruamel.yaml import YAML

from qlora.core.dvc_lock import recorded_outputs, require_recorded
from qlora.core.errors import InputError, MachineError, UserFacingError, translate_errors
from qlora.core.files import json_document
from qlora.core.hashing import sha256_of
from qlora.delivery import hub
from qlora.model.manifest import read_manifest
from qlora.runtime import command

ADAPTER = Path("models/adapter")
MANIFESTS = Path("models/base")
CARD = Path("reports/model_card.md")
CARD_TEXTS = Path("models/card.yaml")
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
SAFE = {
    *REQUIRED,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
"""All that may lie in models/adapter: what PEFT and transformers save of adapters and tokenizers, nothing pickled, nothing that is run."""
LICENCE_NAMES = ("license", "licence", "copying", "notice")
"""How the name of a licence file begins, in any case. None of SAFE does."""


def contents() -> dict[str, bytes | Path]:
    """Every file that is published, by its name on the Hub: where it lies, or its bytes where those are made for the Hub.

    Raises:
        InputError: something is missing, not as it was made, or not known to be safe.
    """
    files = _adapter()
    if not CARD.is_file():
        raise InputError("publish-card", f"{CARD} does not exist: make it with `python -m tools.card`")
    licence = _licence_file()
    return {**files, "README.md": CARD, licence.name: licence}


def _adapter() -> dict[str, bytes | Path]:
    missing = [name for name in REQUIRED if not (ADAPTER / name).is_file()]
    if missing:
        raise InputError("adapter-missing", f"{ADAPTER} holds no {' and no '.join(missing)}: `dvc repro train` or `dvc pull` restores it")
    foreign = sorted(path.name for path in ADAPTER.iterdir() if path.name not in SAFE or not path.is_file())
    if foreign:
        raise InputError(
            "publish-foreign", f"{ADAPTER} holds {', '.join(foreign)}, which no adapter needs: it may hold a pickle or a token. Remove it."
        )
    if str(ADAPTER) not in recorded_outputs():
        raise InputError("publish-unrecorded", f"dvc.lock does not record {ADAPTER}: `dvc repro`, so that what is published can be made again")
    require_recorded([ADAPTER])
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(ADAPTER.iterdir())}
    return {**files, "adapter_config.json": published_config((ADAPTER / "adapter_config.json").read_bytes())}


def published_config(text: bytes) -> bytes:
    """The adapter's config with the base model as the Hub knows it: models/base/NAME is a path of this repository."""
    with translate_errors("adapter-unloadable", ADAPTER / "adapter_config.json", "is not a config of PEFT", "run `dvc repro`"):
        config = dict(json.loads(text))
        json_document(config)
    base = Path(str(config.get("base_model_name_or_path")))
    manifest = MANIFESTS / f"{base.name}.json"
    if base.parent != MANIFESTS or not manifest.is_file():
        return text
    pinned = read_manifest(manifest)
    if not pinned.repo_id:
        command.say(f"{base} is not pinned from the Hub: who loads the adapter needs the base model at that path.")
        return text
    return json_document({**config, "base_model_name_or_path": pinned.repo_id, "revision": pinned.revision})


def _licence_file() -> Path:
    if not CARD_TEXTS.is_file():
        raise InputError("publish-license", f"{CARD_TEXTS} does not exist: it names the adapter's licence file as license_file")
    with translate_errors("publish-license", CARD_TEXTS, "is not YAML", f"see `git diff {CARD_TEXTS}`"):
        texts = YAML(typ="safe", pure=True).load(CARD_TEXTS)
    named = texts.get("license_file") if isinstance(texts, dict) else None
    if not named:
        raise InputError("publish-license", f"{CARD_TEXTS} has no license_file: name the file with the adapter's licence, such as LICENSE")
    path = Path(str(named))
    problem = _licence_problem(path)
    if problem:
        raise InputError("publish-license", f"license_file in {CARD_TEXTS} is {named!r}: {problem}. Name the file with the licence, such as LICENSE.")
    return path


def _licence_problem(path: Path) -> str | None:
    """Why this file is not published as the licence: what is no licence, or kept out of Git, may hold a secret."""
    place = Path.cwd().resolve() / path
    if path.is_absolute() or path.resolve() != place or not path.is_file():
        return "no file of this repository, or behind a link"
    if any(part.startswith(".") for part in path.parts):
        return "a hidden file, or in a hidden folder"
    if not path.name.lower().startswith(LICENCE_NAMES):
        return "its name begins with none of LICENSE, LICENCE, COPYING and NOTICE"
    tracked = subprocess.run(["git", "--literal-pathspecs", "ls-files", "--error-unmatch", "--", str(path)], capture_output=True, check=False)
    return "Git does not track it; if it is the licence, `git add` it" if tracked.returncode else None


def check_card() -> None:
    """Refuse a card that is not what would be computed now.

    Raises:
        InputError: it differs.
        MachineError: it could not be computed.
    """
    code = subprocess.run([sys.executable, "-m", "tools.card", "--check"], check=False).returncode
    if code:
        kind: type[UserFacingError] = InputError if code == InputError.exit_code else MachineError
        raise kind("publish-card", f"`python -m tools.card --check` ended with {code}: nothing is published beside a card that is not true")


def upload(repo_id: str, files: dict[str, bytes | Path], *, private: bool) -> str:
    """All files in one commit.

    Returns:
        The commit's address.

    Raises:
        InputError: no token, or not one that may write there.
        MachineError: the Hub can't be reached.
    """
    # Not every mirror takes Xet uploads, and an adapter is small; set to 0, huggingface_hub uses them.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    hub.connect()
    from huggingface_hub import CommitOperationAdd, HfApi, get_token  # noqa: PLC0415

    if get_token() is None:
        raise InputError("hub-denied", f"no token: set HF_TOKEN to one that may write to {repo_id}")
    api = HfApi(endpoint=hub.endpoint())
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    with hub.translate_hub_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        try:
            made = api.create_commit(repo_id, operations, commit_message="Publish adapter, card and licence")
            return hub.without_userinfo(str(made.commit_url))
        except ValueError as error:
            if not str(error).startswith("Invalid metadata in README.md"):
                raise
            raise InputError("publish-card", f"the Hub does not take {CARD}: {hub.plain(error)}. Fix {CARD_TEXTS}.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", required=True, help="ORG/NAME on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="list the files, upload nothing")
    parser.add_argument("--private", action="store_true", help="a repository made now is private; one that exists stays what it is")
    arguments = parser.parse_args()
    if len(arguments.repo_id.split("/")) != 2 or not all(map(hub.NAME.fullmatch, arguments.repo_id.split("/"))):
        raise InputError("hub-name", f"{arguments.repo_id!r} can't be a repository of the Hub: ORG/NAME of letters, digits, '.', '_' and '-'")
    files = contents()
    check_card()
    for name, content in sorted(files.items()):
        size, digest = (content.stat().st_size, sha256_of(content)) if isinstance(content, Path) else (len(content), sha256(content).hexdigest())
        command.say(f"{size:>13,}  {digest}  {name}")
    command.say(f"{len(files)} files for {arguments.repo_id}")
    if not arguments.dry_run:
        command.say(upload(arguments.repo_id, files, private=arguments.private))


if __name__ == "__main__":
    command.run(main)
