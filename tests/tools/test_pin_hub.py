"""Pinning from a server on this machine that speaks the Hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.core.errors import MachineError
from qlora.delivery.hub import Commit, HubFile
from qlora.model.manifest import Manifest
from qlora.runtime.locks import try_lock
from tests.hub import COMMIT, TOKEN, FakeHub, Fault, Repository, pointer, serving, sha1
from tools.pin import require_listed

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models/base/tiny"
WEIGHTS = (TINY / "model.safetensors").read_bytes()
LOADED = ("config.json", "model.safetensors", "tokenizer.json")
FILES = {
    **{name: (TINY / name).read_bytes() for name in LOADED},
    "pytorch_model.bin": b"a pickle",
    "README.md": b"words",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"the same once more",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeHub]:
    (tmp_path / "models/base").mkdir(parents=True)
    with serving() as state:
        state.repositories["models", "org/name"] = Repository(dict(FILES), {"license": "apache-2.0"})
        yield state


def pin(root: Path, endpoint: str, repo_id: str = "org/name", revision: str = COMMIT) -> subprocess.CompletedProcess[str]:
    """The tool as a process: huggingface_hub reads where its cache is once, at import."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(root / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tools.pin", "mine", "--repo-id", repo_id, "--revision", revision]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_one_commit_is_downloaded_hashed_and_linked_without_its_pickles(tmp_path: Path, server: FakeHub, revision: str) -> None:
    done = pin(tmp_path, server.endpoint, revision=revision)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "models/base/mine.json").read_text(encoding="utf-8"))
    assert (manifest["repo_id"], manifest["revision"], manifest["license"]) == ("org/name", COMMIT, "apache-2.0")
    assert manifest["files"] == {name: {"bytes": len(FILES[name]), "sha256": hashlib.sha256(FILES[name]).hexdigest()} for name in LOADED}
    weights = tmp_path / "models/base/mine/model.safetensors"
    assert weights.read_bytes() == WEIGHTS
    assert not any(name in request.path for name in ("pytorch_model.bin", "onnx", "original") for request in server.asked)
    assert all("authorization" not in request.headers for request in server.asked if request.on_cdn)

    # A damaged file in the cache is brought again; a manifest that says the same, written before licences were, keeps its bytes.
    del manifest["license"]
    earlier = json.dumps(manifest)
    (tmp_path / "models/base/mine.json").write_text(earlier, encoding="utf-8")
    blob = weights.resolve()
    blob.write_bytes(b"!" + WEIGHTS[1:])
    done = pin(tmp_path, server.endpoint)
    assert done.returncode == 0, done.stderr
    assert blob.read_bytes() == WEIGHTS
    assert (tmp_path / "models/base/mine.json").read_text(encoding="utf-8") == earlier
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []


def test_a_foreign_file_in_the_folder_is_never_pinned_as_part_of_the_commit(tmp_path: Path, server: FakeHub) -> None:
    assert pin(tmp_path, server.endpoint).returncode == 0
    manifest = (tmp_path / "models/base/mine.json").read_bytes()
    (tmp_path / "models/base/mine/vocab.json").write_text("not of the Hub", encoding="utf-8")
    done = pin(tmp_path, server.endpoint)
    assert (done.returncode, "[pin-foreign]" in done.stderr, "holds vocab.json, which org/name" in done.stderr) == (2, True, True), done.stderr
    assert (tmp_path / "models/base/mine.json").read_bytes() == manifest


def test_two_at_once_do_not_append_to_one_file(tmp_path: Path, server: FakeHub) -> None:
    path = tmp_path / "hub/hub/.locks/models--org--name/pin.lock"
    path.parent.mkdir(parents=True)
    lock = try_lock(path)
    assert lock is not None
    with lock:
        done = pin(tmp_path, server.endpoint)
        assert (done.returncode, "[pin-running]" in done.stderr) == (3, True), done.stderr
        assert not any("/resolve/" in request.path for request in server.asked)
    assert pin(tmp_path, server.endpoint).returncode == 0


@pytest.mark.parametrize("changed", [{"model.safetensors": (3, "b" * 64)}, {"config.json": (1, "c" * 64)}, {"foreign.json": (2, "d" * 64)}])
def test_what_was_hashed_must_be_what_the_hub_lists(changed: dict[str, tuple[int, str]]) -> None:
    files = (HubFile("config.json", 2, "1" * 40, False), HubFile("model.safetensors", 3, "a" * 64, True), HubFile("README.md", 5, "2" * 40, False))
    commit = Commit("org/name", COMMIT, "model", None, files)
    hashed = {"config.json": (2, "c" * 64), "model.safetensors": (3, "a" * 64)}

    def manifest(entries: dict[str, tuple[int, str]]) -> Manifest:
        return Manifest({name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()})

    require_listed(manifest(hashed), commit)
    with pytest.raises(MachineError, match=rf"\[hub-damaged\] {next(iter(changed))} of org/name changed"):
        require_listed(manifest({**hashed, **changed}), commit)


def test_a_broken_download_goes_on_when_run_again(tmp_path: Path, server: FakeHub) -> None:
    server.faults += [Fault("model.safetensors", "broken", times=1), Fault("model.safetensors", 403)]
    done = pin(tmp_path, server.endpoint)
    assert (done.returncode, "[hub-denied]" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert list((tmp_path / "models/base").iterdir()) == []
    server.faults.clear()
    server.asked.clear()
    done = pin(tmp_path, server.endpoint)
    assert done.returncode == 0, done.stderr
    assert server.ranges() == [f"bytes={len(WEIGHTS) // 2}-"]
    assert (tmp_path / "models/base/mine/model.safetensors").read_bytes() == WEIGHTS


def test_a_header_names_no_file(tmp_path: Path, server: FakeHub) -> None:
    """The cache's files are called by the listed sums, which are checked; huggingface_hub calls them by what a header says."""
    headers = {"ETag": '"../../../escaped"', "X-Linked-Etag": '"../../../escaped"', "X-Repo-Commit": "../../escaped", "X-Linked-Size": "2"}
    server.faults.append(Fault("/resolve/", 200, headers=headers, body=FILES["config.json"]))
    done = pin(tmp_path, server.endpoint)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert [path for path in tmp_path.rglob("*") if "escaped" in path.name] == []
    blobs = tmp_path / "hub/hub/models--org--name/blobs"
    assert {path.name.partition(".")[0] for path in blobs.iterdir()} == {sha1(FILES["config.json"]), hashlib.sha256(WEIGHTS).hexdigest()}


@pytest.mark.parametrize("kind", ["wrong", "pointer"])
def test_other_bytes_never_get_a_manifest(tmp_path: Path, server: FakeHub, kind: str) -> None:
    server.faults.append(Fault("model.safetensors", kind))
    done = pin(tmp_path, server.endpoint)
    assert (done.returncode, "[hub-damaged]" in done.stderr, "Traceback" in done.stderr) == (3, True, False), done.stderr
    assert list((tmp_path / "models/base").iterdir()) == []
    assert not any(path.read_bytes() == pointer(WEIGHTS) for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("repo_id", "code", "hint"),
    [("org/gated", "hub-gated", "HF_TOKEN"), ("org/absent", "hub-not-found", "org/absent"), ("org/empty", "base-model-no-weights", "safetensors")],
)
def test_what_the_hub_refuses_is_said_in_one_message(tmp_path: Path, server: FakeHub, repo_id: str, code: str, hint: str) -> None:
    server.repositories["models", "org/gated"] = Repository(dict(FILES))
    server.repositories["models", "org/empty"] = Repository({"pytorch_model.bin": b"a pickle"})
    server.faults.append(Fault("/org/gated/resolve/", 403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "consent"}))
    done = pin(tmp_path, server.endpoint, repo_id)
    assert done.returncode == 2
    assert f"[{code}]" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "models/base").iterdir()) == []


def test_a_hub_that_does_not_answer_is_exit_code_3(tmp_path: Path) -> None:
    # Discard: nothing listens there.
    done = pin(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 3, done.stderr
    assert "[hub-unreachable]" in done.stderr
    assert "Traceback" not in done.stderr
