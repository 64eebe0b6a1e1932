"""Pinning from a server on this machine that speaks the Hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"a pickle", "README.md": b"words"}


class Hub(BaseHTTPRequestHandler):
    """One repository, org/name, at one commit; org/gated asks for consent."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if "org/gated" in path:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "consent"}, body=body)
        if path == f"/api/models/org/name/revision/{COMMIT}":
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body=body)
        if path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in FILES.items()]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body=body)
        prefix = f"/org/name/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in FILES:
            data = FILES[path.removeprefix(prefix)]
            return self.send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body=body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's own output is enough."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pin(root: Path, hub: ThreadingHTTPServer, repo_id: str) -> subprocess.CompletedProcess[str]:
    """The tool as a process: huggingface_hub reads its endpoint once, at import."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(root / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tools.pin", "mine", "--repo-id", repo_id, "--revision", COMMIT]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_one_commit_is_downloaded_hashed_and_linked_without_its_pickles(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    (tmp_path / "models/base").mkdir(parents=True)
    done = pin(tmp_path, hub, "org/name")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "models/base/mine.json").read_text(encoding="utf-8"))
    assert (manifest["repo_id"], manifest["revision"]) == ("org/name", COMMIT)
    assert manifest["files"] == {
        name: {"bytes": len(FILES[name]), "sha256": hashlib.sha256(FILES[name]).hexdigest()} for name in ("config.json", "model.safetensors")
    }
    assert (tmp_path / "models/base/mine/model.safetensors").read_bytes() == b"weights"
    assert not any("pytorch_model.bin" in path for path in hub.asked)


@pytest.mark.parametrize(("repo_id", "code", "hint"), [("org/gated", "hub-gated", "HF_TOKEN"), ("org/absent", "hub-not-found", "org/absent")])
def test_what_the_hub_refuses_is_said_in_one_message(tmp_path: Path, hub: ThreadingHTTPServer, repo_id: str, code: str, hint: str) -> None:
    done = pin(tmp_path, hub, repo_id)
    assert done.returncode == 2
    assert f"[{code}]" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()


def test_a_hub_that_does_not_answer_is_exit_code_3(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    class Gone:
        server_port = 9  # discard: nothing listens there

    done = pin(tmp_path, Gone, "org/name")
    assert done.returncode == 3, done.stderr
    assert "[hub-unreachable]" in done.stderr
    assert "Traceback" not in done.stderr
