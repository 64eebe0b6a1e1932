"""Base models by manifest: models/base/NAME.json holds the sha256 of every file, and the weights stay where they are.

Imports no torch: the tools that write and check manifests start at once.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.core.errors import InputError, translate_errors
from qlora.core.files import read_record, require_file
from qlora.core.hashing import project_root, remembered, sha256_of
from qlora.params.base_model import BaseModelParams

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
LOADED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files that loading a model may read. Nothing pickled, no code."""
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"


@dataclass(frozen=True)
class Manifest:
    """models/base/NAME.json."""

    files: dict[str, dict[str, Any]]
    """{file name: {"bytes": n, "sha256": hex}}"""
    repo_id: str | None = None
    revision: str | None = None
    """Commit of the Hub repository, 40 hex digits; both or neither."""

    def record(self) -> dict[str, Any]:
        source = {"repo_id": self.repo_id, "revision": self.revision} if self.repo_id else {}
        return {**source, "files": self.files}


def read_manifest(path: Path) -> Manifest:
    """Raises InputError when there is none or it is not of this form."""
    if not path.is_file():
        raise InputError(
            "base-model-unpinned", f"{path} does not exist: pin the model with `python -m tools.pin {path.stem} --path DIR`, or set base_model.name"
        )
    with translate_errors("base-model-manifest", path, "is not a manifest", "write it again with tools.pin"):
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in record["files"].items()}
        repo_id, revision = record.get("repo_id"), record.get("revision")
        if wrong := [name for name in files if Path(name).name != name or "\0" in name]:
            raise ValueError(f"{wrong[0]!r} is not the name of a file")
        if (repo_id is not None or revision is not None) and not (REPO_ID.fullmatch(repo_id) and COMMIT.fullmatch(revision)):
            raise ValueError(f"{repo_id!r} at {revision!r} is not a commit of the Hub")
    return Manifest(files, repo_id, revision)


def loadable_files(folder: Path) -> Iterator[Path]:
    """Files of a model's folder that loading it may read, sorted by name; raises MachineError for a pipe or device among them."""
    for path in sorted(folder.iterdir()):
        if path.suffix in LOADED_SUFFIXES:
            require_file(path)
            if path.is_file():
                yield path


def make_manifest(folder: Path, repo_id: str | None = None, revision: str | None = None) -> Manifest:
    """Hash a model's folder.

    Raises:
        InputError: it is no folder, holds no safetensors weights, or names others.
    """
    if not folder.is_dir():
        raise InputError("base-model-missing", f"{folder} is not a folder")
    paths = list(loadable_files(folder))
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError("base-model-no-weights", f"{folder} holds no .safetensors file: only safetensors weights are loaded")
    require_own_weights(folder)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    return Manifest(files, repo_id, revision)


def require_own_weights(folder: Path) -> None:
    """Refuse a folder of which transformers would read other weights than the safetensors files that lie in it and are hashed.

    Raises:
        InputError: config.json or the index names a pickle or a file elsewhere, or an adapter lies in the folder, which would be loaded too.
    """
    foreign = [name for name in _named_weights(folder) if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors")]
    if (folder / "adapter_config.json").exists():
        foreign.append("adapter_config.json")
    if foreign:
        raise InputError(
            "base-model-not-safetensors",
            f"{folder} would load {foreign[0]!r}, which is not a safetensors file of its own folder: remove it, or what names it in config.json "
            f"or {INDEX}, or pin another model",
        )


def _named_weights(folder: Path) -> list[Any]:
    """What the folder's config and index name as weights; without them model.safetensors is read."""
    config = read_record(folder / "config.json")
    # transformers takes the config of a model's text part for the whole where it loads that alone.
    sections = [section for section in (config, config.get("text_config")) if isinstance(section, dict)]
    names = [section["transformers_weights"] for section in sections if section.get("transformers_weights")]
    indices = [name for name in names if isinstance(name, str) and name.endswith(INDEX_SUFFIX) and "/" not in name]
    shards = [read_record(folder / index).get("weight_map") for index in [INDEX, *indices]]
    return [name for name in names if name not in indices] + [name for found in shards if isinstance(found, dict) for name in found.values()]


def verify(manifest: Manifest, folder: Path, memory: Path | None) -> None:
    """Compare every file of the folder with the manifest.

    Args:
        memory: See `remembered`; None hashes every file.

    Raises:
        InputError: a file is missing, differs, or is there without being in the manifest.
    """
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        found = remembered(path, sha256_of, memory) if memory else sha256_of(path)
        if path.stat().st_size != entry["bytes"] or found != entry["sha256"]:
            problems.append(f"{path} has sha256 {found[:12]}..., the manifest says {entry['sha256'][:12]}...")
    problems += [f"{path} is not in the manifest" for path in loadable_files(folder) if path.name not in manifest.files]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(
            "base-model-changed",
            f"the base model in {folder} is not the pinned one:\n{listed}\nRestore its files, or pin them as they are with `python -m tools.pin`.",
        )


def find_weights(name: str, manifest: Manifest) -> Path:
    """models/base/NAME/ (a folder or a link), else the snapshot in the Hub cache.

    Raises:
        InputError: neither is there.
    """
    folder = project_root() / "models" / "base" / name
    if folder.is_dir():
        return folder
    way_out = f"link them with `python -m tools.pin {name} --path DIR`"
    if manifest.repo_id:
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415 - half a second that a local folder need not pay

        snapshot = Path(HF_HUB_CACHE) / f"models--{manifest.repo_id.replace('/', '--')}" / "snapshots" / str(manifest.revision)
        if snapshot.is_dir():
            return snapshot
        way_out = f"download them with `python -m tools.pin {name} --repo-id {manifest.repo_id} --revision {manifest.revision}`, or {way_out}"
    raise InputError("base-model-missing", f"the weights of base_model.name = {name!r} are not at {folder}: {way_out}")


def check_vocabulary(folder: Path) -> None:
    """Compare the tokenizer's ids with the rows of the embedding, before a run fails in the middle of its work.

    Raises:
        InputError: a token has an id that the model has no row for.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        rows = int((config.get("text_config") or config)["vocab_size"])
        vocabulary = tokenizer["model"]["vocab"]
        named = vocabulary if isinstance(vocabulary, dict) else {token: number for number, (token, _) in enumerate(vocabulary)}
        ids = {**named, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
        beyond = [token for token, number in ids.items() if number >= rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        # Other kinds of files: loading them says what is wrong with them.
        return
    if beyond:
        raise InputError(
            "base-model-vocabulary",
            f"{len(beyond)} tokens of {folder / 'tokenizer.json'}, such as {beyond[-1]!r}, have ids beyond the model's {rows} embeddings "
            "(vocab_size of config.json): use the tokenizer that the weights were trained with, or resize the embeddings and save the model again",
        )


def verified_folder(params: BaseModelParams, manifests: Path) -> Path:
    """Folder of the weights, after every file's sha256 was compared with the manifest."""
    manifest = read_manifest(manifests / f"{params.name}.json")
    folder = find_weights(params.name, manifest)
    verify(manifest, folder, project_root() / ".dvc" / "tmp" / "verified.json")
    check_vocabulary(folder)
    return folder
