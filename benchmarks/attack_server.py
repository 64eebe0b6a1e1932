"""A server on this machine that speaks the Hub's protocol as far as benchmarks/attack.py needs it, and lies as a script says."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IN_LFS = (".safetensors", ".parquet")


@dataclass
class Script:
    """What the server says for one input."""

    name: str
    files: dict[str, bytes]
    info: Any = None
    """The answer about the revision; bytes are sent as they are, None: a good one."""
    tree: Any = None
    status: dict[str, int] = field(default_factory=dict)
    """By kind of request (info, tree, file, post): its status."""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    body: dict[str, bytes] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    """In place of the whole answer, status line included."""
    on_and_on: dict[str, tuple[bytes, bytes, float]] = field(default_factory=dict)
    """A beginning, then a piece again and again with so many seconds between."""


class HostileHub:
    """One server, one script at a time."""

    def __init__(self) -> None:
        self.script: Script | None = None
        self.generation = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def begin(self, script: Script | None) -> None:
        self.script = script
        self.generation += 1

    def end(self) -> None:
        """Answers without end stop."""
        self.begin(None)


class _Handler(BaseHTTPRequestHandler):
    hub: HostileHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def _kind(self) -> str:
        path = self.path.partition("?")[0]
        if self.command in ("POST", "PUT"):
            return "post"
        return "info" if "/revision/" in path else "tree" if "/tree/" in path else "file"

    def _answer(self) -> None:
        script = self.hub.script
        self.rfile.read(int(self.headers.get("Content-Length", 0) or 0))
        self.close_connection = True
        if script is None:
            return
        kind = self._kind()
        if kind in script.raw:
            self.wfile.write(script.raw[kind])
            return
        if kind in script.on_and_on:
            self._on_and_on(*script.on_and_on[kind])
            return
        headers = dict(script.headers.get(kind, {}))
        status = script.status.get(kind, 200)
        data = script.body[kind] if kind in script.body else self._good(kind, script) if status < 400 else b'{"error": "no"}'
        if data is None:
            status, data = 404, b"{}"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _on_and_on(self, beginning: bytes, piece: bytes, seconds: float) -> None:
        generation = self.hub.generation
        until = time.monotonic() + 60
        self.wfile.write(beginning)
        while generation == self.hub.generation and time.monotonic() < until:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(seconds)

    def _good(self, kind: str, script: Script) -> bytes | None:
        if kind == "info":
            info = {"id": "org/name", "sha": COMMIT, "cardData": {"license": "mit"}, "siblings": []} if script.info is None else script.info
            return info if isinstance(info, bytes) else json.dumps(info).encode()
        if kind == "tree":
            tree = listing(script.files) if script.tree is None else script.tree
            return tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        if kind == "post":
            return self._published()
        name = self.path.partition("?")[0].partition(f"/resolve/{COMMIT}/")[2]
        return script.files.get(name)

    def _published(self) -> bytes:
        path = self.path.partition("?")[0]
        if "/preupload/" in path:
            return b'{"files": []}'
        return json.dumps(
            {"url": f"{self.hub.endpoint}/org/name", "commitUrl": "x", "commitOid": COMMIT, "success": True, "errors": [], "warnings": []}
        ).encode()


def listing(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """A good answer for these files."""
    found: list[dict[str, Any]] = []
    for name, data in files.items():
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name.endswith(IN_LFS):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        found.append(entry)
    return found


BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"5",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"<html>\x1b[2J</html>",
    b"\xff\xfe\x00",
    b"\x1f\x8b\x08\x00",
    b'{"sha": NaN}',
    b'{"sha": "\\ud800"}',
    b"[1" + b",1" * 200_000 + b"]",
    b"9" * 100_000,
    bytes(1 << 20),
    b'{"error": "\x1b]0;owned\x07"}',
    b'{"error": "' + b"x" * 100_000 + b'"}',
    b'{"errors": [{"message": null}]}',
    b'{"errors": 5}',
    b'{"error": {"a": [1]}}',
)
HEADERS: tuple[dict[str, str], ...] = (
    {"X-Error-Code": "RepoNotFound"},
    {"X-Error-Code": "GatedRepo"},
    {"X-Error-Code": "RevisionNotFound"},
    {"X-Error-Code": "EntryNotFound"},
    {"X-Error-Code": "DisabledRepo"},
    {"X-Error-Code": "\u00ff" * 50},
    {"X-Error-Message": "\x1b[31mred\x07 " + "y" * 5000},
    {"X-Error-Message": "Access to model org/name is restricted"},
    {"Location": "/"},
    {"Location": ""},
    {"Location": "//"},
    {"Location": "http://[::1"},
    {"Location": "file:///etc/passwd"},
    {"Location": "http://127.0.0.1:1/"},
    {"Location": "http://a b/"},
    {"Location": "ftp://127.0.0.1/"},
    {"Location": "http://127.0.0.1:99999/"},
    {"Location": "javascript:x"},
    {"Location": "?" * 70_000},
    {"Location": "http://\u00ff\u00fe/"},
    {"Location": "http://user:pass@127.0.0.1:1/"},
    {"Content-Length": "0"},
    {"Content-Length": "-1"},
    {"Content-Length": "x"},
    {"Content-Length": "99999999999999999999999"},
    {"Content-Length": "5"},
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "br"},
    {"Content-Encoding": "x, y"},
    {"Transfer-Encoding": "chunked"},
    {"Transfer-Encoding": "gzip"},
    {"Content-Range": "bytes 0-1/2"},
    {"Content-Range": "bytes 9-1/*"},
    {"Content-Type": "text/html; charset=nope"},
    {"Content-Type": "application/json; charset=\u00ff"},
    {"Retry-After": "0"},
    {"Retry-After": "99999999"},
    {"Retry-After": "x"},
    {"Retry-After": "-5"},
    {"Retry-After": "\u00b2"},
    {"Retry-After": "9" * 5000},
    {"RateLimit": '"api";r=0;t=99999'},
    {"RateLimit": '"api";r=0;t=' + "9" * 5000},
    {"RateLimit": "x"},
    {"RateLimit": '"api";r=-1;t=-1'},
    {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=x;w=y'},
    {"Link": '<http://127.0.0.1:1/?x>; rel="next"'},
    {"Link": '<?cursor=1>; rel="next"'},
    {"Link": "<" * 5000},
    {"Link": '<http://[>; rel="next"'},
    {"Link": 'x; rel="next"'},
    {"Link": '<>; rel="next"'},
    {"Set-Cookie": "a=" + "b" * 10_000},
    {"WWW-Authenticate": "x" * 10_000},
    {"Connection": "upgrade", "Upgrade": "h2c"},
    {"X-Request-Id": "\x1b[2J\u009b31m"},
    {"Location": "/again", "X-Repo-Commit": "x"},
    {"ETag": '"' + "e" * 70_000 + '"'},
    {"Date": "x", "Server": "\u0080"},
)
STATUSES = (
    200,
    201,
    202,
    204,
    206,
    300,
    301,
    302,
    303,
    304,
    307,
    308,
    400,
    401,
    403,
    404,
    405,
    406,
    408,
    409,
    410,
    416,
    418,
    429,
    451,
    500,
    501,
    502,
    503,
    504,
    507,
    511,
    599,
)
RAW = (
    b"",
    b"\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 999 X\r\n\r\n",
    b"HTTP/1.1 0 X\r\n\r\n",
    b"HTTP/1.1 -5 X\r\n\r\n",
    b"HTTP/1.1 200\r\n\r\n",
    b"HTTP/1.1 200 " + b"x" * 200_000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 200 \x1b[31mOK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 500 \x1b]0;x\x07\xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 404 Not\xc2\x9bFound\r\nX-Error-Message: \xc2\x9b31m\xe2\x80\xaex\r\nContent-Length: 2\r\n\r\n{}",
    b"SSH-2.0-OpenSSH_9.0\r\n",
    b"\x16\x03\x01\x02\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"<html>",
)
PATHS: tuple[Any, ...] = (
    "../x",
    "/etc/passwd",
    "a/../b",
    "a//b",
    ".",
    "..",
    "",
    "\0",
    "\x1b[2J.json",
    "\u202e.json",
    "\ud800",
    "a" * 300,
    "/".join(["a"] * 2000),
    "CON",
    "a\\b",
    "config.json/x",
    "CONFIG.JSON",
    "e\u0301.json",
    "\u00e9.json",
    "x.dvc",
    "dvc.yaml",
    ".gitignore",
    ".git/config",
    "model.safetensors.partial",
    "data",
    " ",
    "a\n.json",
    "~",
    "*",
    "config.json ",
    "\u2028",
    "pytorch_model.bin",
    "adapter_config.json",
    None,
    5,
    [],
    {},
)
SIZES: tuple[Any, ...] = (0, -1, 1, 1 << 31, 1 << 62, 1 << 63, 1 << 70, 1.5, "5", None, True, [], 1e308)
DIGESTS: tuple[Any, ...] = ("", "0" * 40, "0" * 64, "x" * 40, "../../x", "A" * 40, "0" * 39, "0" * 40 + "\n", None, 5, [], "\u0660" * 40)


def _source(entry: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The entry, or the part of it that says what is in LFS."""
    lfs = entry.get("lfs")
    return lfs if isinstance(lfs, dict) and rng.random() < 0.5 else entry


def _lie_in_tree(rng: random.Random, files: dict[str, bytes]) -> Any:
    tree: list[Any] = list(listing(files))
    for _ in range(rng.choice((1, 1, 2, 4))):
        entry = rng.choice([one for one in tree if isinstance(one, dict)] or [{}])
        action = rng.randrange(9)
        if action == 0:
            tree.append({**entry, "path": rng.choice(PATHS)})
        elif action == 1:
            entry["path"] = rng.choice(PATHS)
        elif action == 2:
            _source(entry, rng)["size"] = rng.choice(SIZES)
        elif action == 3:
            _source(entry, rng)["oid"] = rng.choice(DIGESTS)
        elif action == 4:
            entry["lfs"] = rng.choice((None, {}, [], "x", 5, {"oid": "0" * 64, "size": 5}, {"oid": None}, True))
        elif action == 5:
            entry["type"] = rng.choice(("directory", "x", None, 5, [], "FILE"))
        elif action == 6:
            tree.append(rng.choice((None, 5, [], {}, "x", {"type": "file"}, [tree[0]])))
        elif action == 7:
            tree += [{**entry, "path": f"f{index}.json"} for index in range(2000)]
        else:
            tree.remove(entry) if entry in tree else None
    return tree


def random_script(rng: random.Random, files: dict[str, bytes], *, slow: bool, publishes: bool) -> Script:
    """A way to lie."""
    kinds = ("post",) if publishes else ("info", "tree", "file")
    kind = rng.choice(kinds)
    script = Script("", dict(files))
    if slow:
        beginning = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
        script.on_and_on[kind] = rng.choice(((beginning, b" ", 1.0), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.0), (beginning, b" " * 65536, 0.0)))
        script.name = f"{kind} on and on"
        return script
    way = rng.randrange(10)
    if way == 0:
        script.raw[kind] = rng.choice(RAW)
        script.name = f"{kind}: raw {script.raw[kind][:40]!r}"
    elif way in (1, 2):
        script.status[kind] = rng.choice(STATUSES)
        if rng.random() < 0.7:
            script.headers[kind] = rng.choice(HEADERS)
        if rng.random() < 0.5:
            script.body[kind] = rng.choice(BODIES)
        script.name = f"{kind}: {script.status[kind]} {str(script.headers.get(kind))[:60]}"
    elif way == 3:
        script.headers[kind] = rng.choice(HEADERS)
        script.name = f"{kind}: headers {str(script.headers[kind])[:60]}"
    elif way == 4:
        script.body[kind] = rng.choice(BODIES)
        script.name = f"{kind}: body {script.body[kind][:30]!r}"
    elif way == 5 and not publishes:
        good = {"id": "org/name", "sha": COMMIT, "cardData": {"license": "mit"}, "siblings": []}
        key = rng.choice(("sha", "cardData", "id", "siblings"))
        value = rng.choice(
            (
                None,
                5,
                "",
                "x",
                [],
                {},
                "A" * 40,
                {"license": 5},
                {"license": ["a", None]},
                {"license": "\x1b[2J"},
                {"license": "x" * 10_000},
                {"license": {"a": 1}},
                {"license": "other", "license_name": []},
                [1],
                "0" * 40,
            )
        )
        script.info = {**good, key: value}
        script.name = f"info: {key} = {str(value)[:40]!r}"
    elif way == 6 and kind == "file":
        name = rng.choice(sorted(files))
        data = files[name]
        script.tree = listing(files)
        script.files[name] = rng.choice(
            (
                data[: len(data) // 2],
                data + b"x",
                b"",
                bytes(len(data)),
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                data[::-1],
            )
        )
        script.name = f"file: {name} is another"
    elif not publishes and files:
        script.tree = _lie_in_tree(rng, files)
        script.name = "tree: lies"
    else:
        script.body[kind] = rng.choice(BODIES)
        script.name = f"{kind}: body {script.body[kind][:30]!r}"
    return script


@contextmanager
def serving() -> Iterator[HostileHub]:
    hub = HostileHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
