"""A server on this machine that speaks the Hub's HTTP protocol, and fails as it is told.

Content in LFS lies on a second server, another host for a client, as on the real Hub: `localhost` beside `127.0.0.1`. There is no Xet.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import pytest
from huggingface_hub import constants

from qlora.delivery import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCH = "main"
"""Leads to the commit where it is looked up; its files are asked for by the commit alone."""
TOKEN = "hf_aTokenThatMustStayASecret"
IN_LFS = (".parquet", ".safetensors", ".bin")
SIGNATURE = "X-Amz-Signature=alsoSecret"


@dataclass
class Repository:
    files: dict[str, bytes]
    card: dict[str, object] = field(default_factory=dict)
    gated: bool = False
    """Its files are for those alone who show the token."""

    @property
    def lfs(self) -> set[str]:
        return {name for name in self.files if name.endswith(IN_LFS)}


@dataclass
class Fault:
    """What happens to requests whose path contains `place`; of several the first that has times left.

    kind: a status; or of a content: "broken" (the connection ends half-way), "mute" (after the headers), "short" (a whole answer with half of it),
    "wrong" (one byte differs), "pointer" (to LFS, in its place), "ranges" (asked for a part, it sends all of it), "dribble" (half of it, then a byte
    at a time), "endless" (all of it, then more until the client has enough).
    """

    place: str
    kind: int | str
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    on_cdn: bool


def sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pointer(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


class FakeHub:
    """Repositories by (type, ORG/NAME), faults to come, and what was asked and committed."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[Request] = []
        self.uploaded: dict[str, bytes] = {}
        self.created: list[dict[str, object]] = []
        self.commits: list[dict[str, bytes]] = []
        self.sha = COMMIT
        self.hub = ThreadingHTTPServer(("127.0.0.1", 0), type("OnHub", (Handler,), {"state": self, "on_cdn": False}))
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), type("OnCdn", (Handler,), {"state": self, "on_cdn": True}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    @property
    def elsewhere(self) -> str:
        return f"http://localhost:{self.cdn.server_port}"

    def fault(self, path: str, *, is_content: bool) -> Fault | None:
        for fault in self.faults:
            if fault.place in path and fault.times > 0:
                if isinstance(fault.kind, str) and not is_content:
                    return None
                fault.times -= 1
                return fault
        return None

    def ranges(self) -> list[str]:
        """Parts that were asked for, in order; each once, where the content lies."""
        return [request.headers["range"] for request in self.asked if "range" in request.headers and "/resolve/" not in request.path]


class Handler(BaseHTTPRequestHandler):
    state: FakeHub
    on_cdn: bool
    kind = ""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.asked.append(Request(self.command, self.path, headers, self.on_cdn))
        path = self.path.partition("?")[0]
        is_content = self.command == "GET" and (self.on_cdn or ("/resolve/" in path and not path.endswith(IN_LFS)))
        fault = self.state.fault(path, is_content=is_content)
        if fault and isinstance(fault.kind, int):
            return self.send(fault.kind, fault.body, fault.headers)
        self.kind = str(fault.kind) if fault else ""
        if self.on_cdn:
            return self.content_or_upload(path, body)
        if self.command == "POST":
            return self.publishing(path, body)
        return self.reading(path)

    def reading(self, path: str) -> None:
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        kind = api[1] if api else "datasets" if file and file[1] else "models"
        repository = self.state.repositories.get((kind, api[2] if api else file[2])) if api or file else None
        if repository is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        named = BRANCH if api and api[3] == "revision" else COMMIT
        if (api[4] if api else file[3]) not in (COMMIT, named):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if api and api[3] == "revision":
            return self.send_json({"id": api[2], "sha": self.state.sha, "cardData": repository.card, "siblings": []})
        if api:
            return self.send_json([self.entry(repository, name) for name in repository.files] + [{"type": "directory", "path": "data", "oid": "0"}])
        return self.resolve(repository, file[4])

    def entry(self, repository: Repository, name: str) -> dict[str, object]:
        data = repository.files[name]
        if name not in repository.lfs:
            return {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
        lfs = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer(data))}
        return {"type": "file", "path": name, "size": len(data), "oid": sha1(pointer(data)), "lfs": lfs}

    def resolve(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"})
        data = repository.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(data)}"'}
        if name not in repository.lfs:
            return self.send_content(data, headers)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        return self.send(302, b"", headers | {"Location": f"{self.state.elsewhere}/{sha256(data)}/{name}?{SIGNATURE}"})

    def content_or_upload(self, path: str, body: bytes) -> None:
        oid = path.split("/")[1]
        if self.command == "PUT":
            self.state.uploaded[oid] = body
            return self.send(200, b"", {"ETag": '"part"'})
        stored = [data for repository in self.state.repositories.values() for data in repository.files.values() if sha256(data) == oid]
        return self.send_content(stored[0], {"ETag": '"cdn"'}) if stored else self.send(404, b"", {})

    def send_content(self, data: bytes, headers: dict[str, str]) -> None:
        kind = self.kind
        if kind == "pointer":
            data = pointer(data)
        if kind == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status, begin = (206, int(asked[1])) if asked and kind != "ranges" else (200, 0)
        if status == 206:
            headers = headers | {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        part = data[begin:]
        if kind in ("dribble", "endless"):
            self.send_on_and_on(status, part, headers)
            return
        sent = part[: {"broken": len(part) // 2, "ranges": len(part) // 2, "short": len(part) // 2, "mute": 0}.get(kind, len(part))]
        self.send(status, sent, headers | {"Content-Length": str(len(sent) if kind == "short" else len(part))})

    def send_on_and_on(self, status: int, part: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, **({"Content-Length": str(len(part))} if self.kind == "dribble" else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(part) // 2
        first, rest = (
            (part[:half], (part[at : at + 1] for at in range(half, len(part)))) if self.kind == "dribble" else (part, repeat(bytes(1 << 16)))
        )
        # The client leaves.
        with suppress(OSError):
            self.wfile.write(first)
            for piece in rest:
                self.wfile.write(piece)
                time.sleep(0.01 if self.kind == "dribble" else 0)

    def publishing(self, path: str, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.state.created.append(json.loads(body))
            return self.send_json({"url": f"{self.state.endpoint}/org/name"})
        if "/preupload/" in path:
            files = [{**file, "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"} for file in json.loads(body)["files"]]
            return self.send_json({"files": [{"path": file["path"], "uploadMode": file["uploadMode"], "shouldIgnore": False} for file in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = f"{self.state.elsewhere}/{{}}?{SIGNATURE}"
            return self.send_json({"objects": [{**entry, "actions": {"upload": {"href": href.format(entry["oid"])}}} for entry in objects]})
        if "/commit/" in path:
            self.state.commits.append(dict(filter(None, map(self.committed, body.splitlines()))))
            return self.send_json({"commitUrl": f"{self.state.endpoint}/org/name/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        return self.send(404, b"{}", {})

    def committed(self, line: bytes) -> tuple[str, bytes] | None:
        record = json.loads(line)
        value = record["value"]
        if record["key"] == "file":
            return value["path"], base64.b64decode(value["content"])
        return (value["path"], self.state.uploaded[value["oid"]]) if record["key"] == "lfsFile" else None

    def send_json(self, record: object) -> None:
        self.send(200, json.dumps(record).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's own output is enough."""


@contextmanager
def serving_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that qlora.hub of this very process takes for the Hub, without pauses between tries."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
        yield state


@contextmanager
def serving() -> Iterator[FakeHub]:
    state = FakeHub()
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in (state.hub, state.cdn)]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        for server, thread in zip((state.hub, state.cdn), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
