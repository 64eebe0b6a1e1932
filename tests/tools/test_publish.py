"""Publishing to a server on this machine that speaks the Hub's protocol, from a small repository of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from qlora.core.dvc_lock import md5_of
from tests.hub import TOKEN, FakeHub, Fault, serving

ROOT = Path(__file__).parents[2]
CONFIG = {"base_model_name_or_path": "models/base/mine", "peft_type": "LORA", "r": 8, "revision": None}
ADAPTER = {
    "adapter_config.json": json.dumps(CONFIG).encode(),
    "adapter_model.safetensors": bytes(range(256)) * 64,
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
}
BASE = {"repo_id": "base-org/base-name", "revision": "b" * 40, "files": {}}


def record(root: Path) -> None:
    """As `dvc repro` would have: what lies in models/adapter is in dvc.lock."""
    outs = [{"path": "models/adapter", "md5": md5_of(root / "models/adapter")}]
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"train": {"cmd": "", "outs": outs}}}), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The tools with an adapter; the card's check is a program that ends as the file `card-ends` says."""
    root = tmp_path / "root"
    for package in ("qlora", "tools"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tools/card.py").write_text("import sys, pathlib\nsys.exit(int(pathlib.Path('card-ends').read_text()))\n", encoding="utf-8")
    (root / "card-ends").write_text("0", encoding="utf-8")
    (root / "models/adapter").mkdir(parents=True)
    (root / "models/base").mkdir()
    (root / "reports").mkdir()
    for name, content in ADAPTER.items():
        (root / "models/adapter" / name).write_bytes(content)
    (root / "models/base/mine.json").write_text(json.dumps(BASE), encoding="utf-8")
    (root / "models/card.yaml").write_text("license: apache-2.0\nlicense_file: LICENSE\n", encoding="utf-8")
    (root / "reports/model_card.md").write_text("---\nlicense: apache-2.0\n---\n# An adapter\n", encoding="utf-8")
    (root / "LICENSE").write_text("Permission is granted.\n", encoding="utf-8")
    for command in (["init", "--quiet"], ["add", "LICENSE"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    record(root)
    return root


def publish(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and name not in ("HF_TOKEN", "PYTHONPATH")}
    everything = {**kept, "HF_HOME": str(root.parent / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    command = [sys.executable, "-m", "tools.publish", "--repo-id", "org/name", *arguments]
    done = subprocess.run(command, cwd=root, env=everything, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with serving() as state:
        yield state


def test_a_dry_run_lists_every_file_with_its_hash_and_asks_no_one(root: Path) -> None:
    done = publish(root, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[:-1]]
    assert [name for _, _, name in lines] == sorted([*ADAPTER, "LICENSE", "README.md"])
    size, digest, _ = next(line for line in lines if line[2] == "adapter_model.safetensors")
    assert (size, digest) == ("16,384", sha256(ADAPTER["adapter_model.safetensors"]).hexdigest())


def test_one_commit_holds_adapter_card_and_licence_and_nothing_else(root: Path, server: FakeHub) -> None:
    server.faults.append(Fault("/preupload/", 429, times=1, headers={"Retry-After": "0"}))
    done = publish(root, "--private", HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{server.endpoint}/org/name/commit/0123456789abcdef0123456789abcdef01234567"
    assert [(made["organization"], made["name"], made["visibility"]) for made in server.created] == [("org", "name", "private")]
    assert len(server.commits) == 1
    config = json.loads(server.commits[0].pop("adapter_config.json"))
    assert config == {**CONFIG, "base_model_name_or_path": "base-org/base-name", "revision": "b" * 40}
    assert server.commits[0] == {
        **{name: content for name, content in ADAPTER.items() if name != "adapter_config.json"},
        "README.md": (root / "reports/model_card.md").read_bytes(),
        "LICENSE": b"Permission is granted.\n",
    }
    stored = [request for request in server.asked if request.on_cdn]
    assert [request.method for request in stored] == ["PUT"]
    assert "authorization" not in stored[0].headers
    assert (root / "models/adapter/adapter_config.json").read_bytes() == ADAPTER["adapter_config.json"]


def test_a_base_model_that_is_not_from_the_hub_is_said_to_be_needed(root: Path) -> None:
    (root / "models/base/mine.json").write_text('{"files": {}}', encoding="utf-8")
    done = publish(root, "--dry-run")
    assert "models/base/mine is not pinned from the Hub" in done.stdout
    assert sha256(ADAPTER["adapter_config.json"]).hexdigest() in done.stdout


def changed(root: Path) -> None:
    (root / "models/adapter/adapter_model.safetensors").write_bytes(b"other weights")


def pickled(root: Path) -> None:
    (root / "models/adapter/training_args.bin").write_bytes(b"a pickle with a token")
    record(root)


def pickled_alone(root: Path) -> None:
    (root / "models/adapter/adapter_model.safetensors").rename(root / "models/adapter/adapter_model.bin")
    record(root)


def unrecorded(root: Path) -> None:
    (root / "dvc.lock").unlink()


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def card_ends(code: int) -> Callable[[Path], None]:
    return lambda root: (root / "card-ends").write_text(str(code), encoding="utf-8") and None


def texts(content: str) -> Callable[[Path], None]:
    return lambda root: (root / "models/card.yaml").write_text(content, encoding="utf-8") and None


def licence(name: str, *, tracked: bool = True) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("password=secret", encoding="utf-8")
        if tracked:
            subprocess.run(["git", "add", "--force", name], cwd=root, check=True)
        texts(f"license_file: {name}\n")(root)

    return spoil


def linked_licence(root: Path) -> None:
    (root / ".env").write_text("password=secret", encoding="utf-8")
    (root / "LICENSE").unlink()
    (root / "LICENSE").symlink_to(".env")


@pytest.mark.parametrize("name", ["Licence.txt", "COPYING", "legal/NOTICE.md"])
def test_a_tracked_file_called_as_a_licence_is_published(root: Path, name: str) -> None:
    licence(name)(root)
    done = publish(root, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"  {Path(name).name}\n" in done.stdout


@pytest.mark.parametrize(
    ("spoil", "code", "says", "status"),
    [
        (changed, "input-changed", "dvc checkout", 2),
        (pickled, "publish-foreign", "training_args.bin", 2),
        (pickled_alone, "adapter-missing", "adapter_model.safetensors", 2),
        (unrecorded, "publish-unrecorded", "dvc repro", 2),
        (without("models/adapter/adapter_config.json"), "adapter-missing", "adapter_config.json", 2),
        (without("reports/model_card.md"), "publish-card", "python -m tools.card", 2),
        (card_ends(2), "publish-card", "ended with 2", 2),
        (card_ends(3), "publish-card", "ended with 3", 3),
        (without("models/card.yaml"), "publish-license", "license_file", 2),
        (texts("license: mit\n"), "publish-license", "license_file", 2),
        (texts("license_file: ../outside\n"), "publish-license", "no file of this repository", 2),
        (texts("license_file: models/adapter/tokenizer.json\n"), "publish-license", "its name begins with none of LICENSE", 2),
        (licence("settings.env"), "publish-license", "its name begins with none of LICENSE", 2),
        (licence(".secrets/LICENSE"), "publish-license", "hidden", 2),
        (licence("LICENSE.local", tracked=False), "publish-license", "Git does not track it", 2),
        (linked_licence, "publish-license", "behind a link", 2),
        (texts("{"), "publish-license", "not YAML", 2),
    ],
)
def test_what_is_not_as_it_should_be_is_refused_unasked(
    root: Path, server: FakeHub, spoil: Callable[[Path], None], code: str, says: str, status: int
) -> None:
    (root.parent / "outside").write_text("not ours to give", encoding="utf-8")
    spoil(root)
    server.asked.clear()
    done = publish(root, HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN)
    assert (done.returncode, f"[{code}]" in done.stderr, says in done.stderr) == (status, True, True), done.stderr
    assert server.asked == []


@pytest.mark.parametrize(
    ("fault", "code", "status"),
    [
        (Fault("/api/repos/create", 403, body=b'{"error": "You do not have the rights"}'), "hub-denied", 2),
        (Fault("/commit/", 500, body=b"your header was Bearer " + TOKEN.encode()), "hub-unreachable", 3),
        (Fault("/validate-yaml", 400, body=b'{"errors": [{"message": "no license of this name"}]}'), "publish-card", 2),
        (Fault("/api/repos/create", 200, body=b"[" * 100_000), "hub-unreachable", 3),
        (Fault("/preupload/", 200, body=b'{"files": [3]}'), "hub-unreachable", 3),
        (Fault("/objects/batch", 200, body=b"[]"), "hub-unreachable", 3),
        (Fault("/commit/", 200, body=b"null"), "hub-unreachable", 3),
    ],
    ids=["create", "commit", "card", "deep", "preupload", "batch", "null"],
)
def test_a_hub_that_fails_ends_with_one_message_and_no_commit(root: Path, server: FakeHub, fault: Fault, code: str, status: int) -> None:
    server.commits.clear()
    server.faults[:] = [fault]
    done = publish(root, HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN)
    server.faults.clear()
    assert (done.returncode, f"[{code}]" in done.stderr) == (status, True), done.stderr
    assert "no license of this name" in done.stderr or code != "publish-card"
    assert server.commits == []


def test_without_a_token_nothing_is_sent(root: Path, server: FakeHub) -> None:
    server.asked.clear()
    done = publish(root, HF_ENDPOINT=server.endpoint)
    assert (done.returncode, "[hub-denied]" in done.stderr) == (2, True), done.stderr
    assert server.asked == []
