"""Whatever the Hub answers, a fetch ends soon: with the listed bytes in their folder, or with one message that names the repository."""

import copy
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.core.errors import InputError, MachineError
from qlora.delivery import hub
from tests.hub import COMMIT, FakeHub, Fault, Repository, serving_this_process, sha1, sha256
from tools import fetch

FILES = {"data/train.parquet": bytes(range(256)) * 40, "README.md": b"words"}
INFO = {"id": "org/name", "sha": COMMIT, "cardData": {"license": "other", "license_name": "llama3"}, "siblings": []}
TREE = [
    {
        "type": "file",
        "path": "data/train.parquet",
        "size": 10240,
        "oid": "1" * 40,
        "lfs": {"oid": sha256(FILES["data/train.parquet"]), "size": 10240},
    },
    {"type": "file", "path": "README.md", "size": 5, "oid": sha1(b"words")},
    {"type": "directory", "path": "data", "oid": "2" * 40},
]
MANY = settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 2.0)
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "root")
    with serving_this_process(monkeypatch) as state:
        state.repositories["datasets", "org/name"] = Repository(dict(FILES))
        # Once: a new client reads the certificates of the machine anew.
        hub.connect()
        monkeypatch.setattr(hub, "connect", lambda: None)
        yield state


NAMES = count()


def outcome(root: Path) -> str:
    """Fetch into a new folder; returns the error's code. Nothing may lie outside of data/raw."""
    name = f"n{next(NAMES)}"
    begun, found, said = time.monotonic(), "", ""
    try:
        fetch.fetch("org/name", "main", name, [], force=False)
    except (InputError, MachineError) as error:
        found, said = error.code, error.message
    if found:
        assert "org/name" in said
        assert len(said) < 1500
        assert said.encode()
        assert not (fetch.RAW / name).exists()
    else:
        folder = fetch.RAW / name
        record = json.loads(fetch.source_of(folder).read_text(encoding="utf-8"))
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(record["files"])
        assert all((folder / path).read_bytes() == FILES[path] for path in record["files"])
    assert time.monotonic() - begun < 5
    assert [path.name for path in root.parent.iterdir()] == ["root"]
    assert {path.name for path in root.iterdir()} <= {"data", ".dvc"}
    assert not (root / "data").exists() or [path.name for path in (root / "data").iterdir()] == ["raw"]
    return found or "fetched"


def places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [here, *(place for key in keys for place in places(document[key], (*here, key)))]


RAW_NUMBERS = {"<inf>": b"1e999", "<long>": b"1" * 5000, "<nan>": b"NaN", "<deep>": b"[" * 50_000 + b"]" * 50_000, "<exponent>": b"1e-9999999"}
TEXTS = st.one_of(
    st.sampled_from(
        ["../escaped", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 100_000, "README.md/x", "readme.md", "DATA/TRAIN.parquet", "", ".", "..", "a/./b"]
    ),
    st.sampled_from(
        ["e\u0301.md", "\ud800", "\u202e", "data", "data/train.parquet/", "x/" * 3000, "a.partial", ".hidden", "f" * 40, "F" * 64, "\u0661" * 40]
    ),
    st.text(max_size=50),
)
VALUES = st.one_of(
    TEXTS,
    st.sampled_from([*RAW_NUMBERS, None, True, -1, 10**18, 2**64, 1.5, [], {}, [[]], {"oid": "../../x", "size": 3}]),
    st.recursive(
        st.none() | st.integers() | st.floats() | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> bytes:
    """The document with values changed, keys dropped or entries doubled, or its bytes damaged."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        # Twice as often the end of a branch: a name, size or digest.
        found = places(document)
        place = draw(st.sampled_from(found + [place for place in found if place and place[-1] in ("path", "size", "oid", "sha", "license")]))
        if not place:
            document = draw(VALUES) if draw(st.booleans()) else document
            continue
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "double"]))
        if kind == "drop":
            del holder[place[-1]]
        elif kind == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        else:
            holder[place[-1]] = draw(VALUES)
    body = json.dumps(document).encode()
    for name, number in RAW_NUMBERS.items():
        body = body.replace(json.dumps(name).encode(), number)
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(body)))
        body = body[:cut] + draw(st.binary(max_size=5)) + body[cut + draw(st.integers(0, 5)) :]
    return body


@MANY
@given(st.one_of(changed(INFO).map(lambda body: ("/revision/", body)), changed(TREE).map(lambda body: ("/tree/", body))))
def test_any_listing_ends_in_the_listed_files_or_in_one_message(server: FakeHub, tmp_path: Path, answer: tuple[str, bytes]) -> None:
    place, body = answer
    server.faults[:] = [Fault(place, 200, body=body)]
    found = outcome(tmp_path / "root")
    assert found in ("fetched", "hub-path", "hub-unreachable", "hub-damaged", "hub-not-found", "fetch-nothing", "disk-space")


HEADERS = st.dictionaries(
    st.sampled_from(
        ["Link", "Content-Encoding", "Content-Range", "ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Location", "Retry-After"]
    )
    | st.sampled_from(["RateLimit", "X-Error-Code", "X-Error-Message", "Content-Type", "Transfer-Encoding"]),
    st.sampled_from(
        ["", "../../x", "1" * 5000, "-1", "gzip", "bytes 0-0/5", "bytes 3-4/99999999999999999999", "<>; rel=next", '<http://[>; rel="next"']
    )
    | st.sampled_from(
        ["http://127.0.0.1:9/", "file:///etc/passwd", "//", "http://a:99999/", "chunked", "\xb2", '"api";r=0;t=9999999', "RepoNotFound", "<" * 9000]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
    max_size=4,
)


GOOD = {"/revision/": json.dumps(INFO).encode(), "/tree/": json.dumps(TREE).encode(), **{path.rpartition("/")[2]: FILES[path] for path in FILES}}


@MANY
@given(
    st.sampled_from(sorted(GOOD)),
    st.sampled_from([200, 200, 200, 200, 200, 206, 204, 301, 302, 304, 307, 401, 403, 404, 416, 429, 451, 500, 503, 999]),
    HEADERS,
    st.sampled_from([None] * 8 + [b"", b"{}", b"[]", b"[" * 100_000, b"\xff"]),
)
def test_any_headers_and_status_end_so_too(
    server: FakeHub, tmp_path: Path, place: str, status: int, headers: dict[str, str], body: bytes | None
) -> None:
    server.faults[:] = [Fault(place, status, headers=headers, body=GOOD[place] if body is None else body)]
    outcome(tmp_path / "root")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x" * 201, "more than 200"),
        ("x/" * 600 + "y", "more than 1000"),
        ("a.partial", "half-written"),
        ("a\u202eb", "can't be printed"),
        ("readme.md", "which can be one file"),
        ("README.md", "which can be one file"),
        ("README.md/x", "both as a file and as the folder"),
    ],
)
def test_names_that_do_not_fit_a_file_system_are_refused(server: FakeHub, path: str, says: str) -> None:
    entry = {"type": "file", "path": path, "size": 1, "oid": "1" * 40}
    server.faults.append(Fault("/tree/", 200, body=json.dumps([*TREE, entry]).encode()))
    with pytest.raises(InputError, match=r"\[hub-path\] org/name lists") as error:
        fetch.fetch("org/name", "main", "name", [], force=False)
    assert says in error.value.message


def test_two_spellings_of_one_name_are_refused(server: FakeHub) -> None:
    entries = [{"type": "file", "path": name, "size": 1, "oid": "1" * 40} for name in ("\u00e9.md", "e\u0301.md")]
    server.faults.append(Fault("/tree/", 200, body=json.dumps(entries).encode()))
    with pytest.raises(InputError, match=r"\[hub-path\]"):
        fetch.fetch("org/name", "main", "name", [], force=False)


@pytest.mark.parametrize("digest", ["../../escaped", "a" * 40, "A" * 64, "a" * 63 + "\n", "\u0661" * 64, None, 7])
def test_a_digest_that_is_none_never_becomes_a_name(server: FakeHub, digest: object) -> None:
    tree = [{**TREE[0], "lfs": {"oid": digest, "size": 10240}}]
    server.faults.append(Fault("/tree/", 200, body=json.dumps(tree).encode()))
    with pytest.raises(MachineError, match=r"org/name: .* does not answer as the Hub does: its listing says for data/train.parquet: oid = "):
        fetch.fetch("org/name", "main", "name", [], force=False)


def test_a_file_for_which_there_is_no_room_is_not_begun(server: FakeHub) -> None:
    tree = [{**TREE[0], "lfs": {"oid": "a" * 64, "size": 10**18}}]
    server.faults.append(Fault("/tree/", 200, body=json.dumps(tree).encode()))
    with pytest.raises(MachineError, match=r"\[disk-space\].*data/train.parquet of org/name"):
        fetch.fetch("org/name", "main", "name", [], force=False)
    assert not any("/resolve/" in request.path for request in server.asked)


def test_all_pages_of_a_listing_are_read_from_the_hub_itself(server: FakeHub) -> None:
    """The second link names another host: the token goes to none but the Hub."""
    first, second = ({"Link": f'<http://127.0.0.1:9/api?recursive=true&cursor={page}>; rel="next"'} for page in "ab")
    server.faults += [
        Fault("/tree/", 200, times=1, headers=headers, body=json.dumps([entry]).encode())
        for entry, headers in zip(TREE, (first, second), strict=False)
    ]
    server.faults.append(Fault("/tree/", 200, body=b"[]"))
    assert [file.path for file in hub.read_commit("org/name", "main", "dataset").files] == ["README.md", "data/train.parquet"]
    assert [request.path.partition("?")[2] for request in server.asked if "/tree/" in request.path] == [
        "recursive=true&expand=false",
        "recursive=true&cursor=a",
        "recursive=true&cursor=b",
    ]


@pytest.mark.parametrize(("entries", "pages"), [([TREE[1]], 2), ([], 1)])
def test_a_listing_whose_pages_do_not_end_is_given_up(server: FakeHub, entries: list[Any], pages: int) -> None:
    server.faults.append(Fault("/tree/", 200, headers={"Link": '<https://hub/api?cursor=again>; rel="next"'}, body=json.dumps(entries).encode()))
    with pytest.raises(MachineError, match=rf"org/name: .*its listing does not end, after {pages} pages"):
        hub.read_commit("org/name", "main", "dataset")


def test_a_listing_that_is_too_long_is_given_up(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_BYTES", 1 << 16)
    server.faults.append(Fault("/tree/", 200, body=b" " * (1 << 18)))
    with pytest.raises(MachineError, match=r"org/name: .*sends an answer without end"):
        hub.read_commit("org/name", "main", "dataset")


def test_redirects_that_do_not_end_are_given_up(server: FakeHub) -> None:
    server.faults.append(Fault("/resolve/", 302, headers={"Location": f"{server.endpoint}/datasets/org/name/resolve/{COMMIT}/README.md"}))
    with pytest.raises(MachineError, match=r"\[hub-unreachable\] org/name: README.md: .*redirects"):
        fetch.fetch("org/name", "main", "name", [], force=False)


@contextmanager
def speaking(first: bytes, piece: bytes, pause: float) -> Iterator[str]:
    """A server that answers any request with `first` and then with `piece` again and again."""
    listener = socket.create_server(("127.0.0.1", 0))

    def speak() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(first)
                    while True:
                        connection.sendall(piece)
                        time.sleep(pause)

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        # Ends accept, which closing alone does not.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize(
    ("first", "piece", "pause", "code"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x", 0.01, "hub-slow"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b" ", 0.01, "hub-slow"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0, "hub-unreachable"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b" " * 1024 + b"\r\n", 0, "hub-unreachable"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b" " * 1024 + b"\r\n", 0, "hub-unreachable"),
        (b"HTTP/1.1 500 Error\r\nTransfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b" " * 1024 + b"\r\n", 0, "hub-unreachable"),
    ],
    ids=["slow header", "slow body", "endless hints", "endless body", "endless redirect", "endless error"],
)
def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch, first: bytes, piece: bytes, pause: float, code: str) -> None:
    for name, value in {"ATTEMPTS": 1, "PAUSE_SECONDS": 0.001, "WINDOW_SECONDS": 0.3, "ANSWER_BYTES": 1 << 18}.items():
        monkeypatch.setattr(hub, name, value)
    begun = time.monotonic()
    with speaking(first, piece, pause) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(MachineError, match=rf"\[{code}\] org/name: "):
            hub.read_commit("org/name", "main", "dataset")
    assert time.monotonic() - begun < 5
