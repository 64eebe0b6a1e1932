"""Every way in which the Hub can fail ends with the right bytes, or with one message and no file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora.core.errors import InputError, MachineError
from qlora.delivery import hub
from tests.conftest import ROOT
from tests.hub import COMMIT, TOKEN, FakeHub, Fault, Repository, pointer, serving_this_process

DATA = bytes(range(256)) * 4096
"""1 MiB: more than one piece of an answer."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "ATTEMPTS", 3)
    with serving_this_process(monkeypatch) as state:
        state.repositories["datasets", "org/name"] = Repository({"train.parquet": DATA, "README.md": b"words", ".gitattributes": b"*"})
        yield state


def fetched(folder: Path, name: str = "train.parquet") -> bytes:
    commit = hub.read_commit("org/name", COMMIT, "dataset")
    file = next(file for file in commit.files if file.path == name)
    hub.download(commit, file, folder / "file")
    return (folder / "file").read_bytes()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_commit_is_listed_with_its_licence_and_the_hubs_own_sums(server: FakeHub) -> None:
    server.repositories["datasets", "org/name"].card = {"license": "other", "license_name": "llama3"}
    commit = hub.read_commit("org/name", COMMIT, "dataset")
    assert commit.license == "llama3"
    assert [(file.path, file.size, file.is_lfs) for file in commit.files] == [("README.md", 5, False), ("train.parquet", len(DATA), True)]
    # printf words | git hash-object --stdin
    assert commit.files[0].digest == "f917a2c299cecfd1baa88af5f6e311ee56e529a8"


@pytest.mark.parametrize(("card", "license"), [({}, None), ({"license": "mit"}, "mit"), ({"license": ["mit", "cc-by-4.0"]}, "mit, cc-by-4.0")])
def test_a_licence_is_what_the_card_says(server: FakeHub, card: dict[str, object], license: str | None) -> None:
    server.repositories["datasets", "org/name"].card = card
    assert hub.read_commit("org/name", COMMIT, "dataset").license == license


def test_content_comes_over_a_redirect_without_the_token(server: FakeHub, tmp_path: Path) -> None:
    server.repositories["datasets", "org/name"].gated = True
    assert fetched(tmp_path) == DATA
    assert fetched(tmp_path, "README.md") == b"words"
    assert [request.path.partition("?")[0].rpartition("/")[2] for request in server.asked if request.on_cdn] == ["train.parquet"]
    assert all(request.on_cdn != ("authorization" in request.headers) for request in server.asked)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("train.parquet", "broken", times=4),
        Fault("train.parquet", "short", times=4),
        Fault("train.parquet", "mute", times=1),
        Fault("train.parquet", "ranges", times=1),
        Fault("/resolve/", 429, times=1, headers={"Retry-After": "0"}),
        Fault("/resolve/", 503, times=2),
        Fault("/revision/", 429, times=1, headers={"Retry-After": "0"}),
        Fault("/revision/", 502, times=2),
    ],
    ids=lambda fault: f"{fault.place.strip('/')}-{fault.kind}",
)
def test_what_passes_is_waited_for(server: FakeHub, tmp_path: Path, fault: Fault) -> None:
    server.faults.append(fault)
    assert fetched(tmp_path) == DATA
    assert left(tmp_path) == ["file"]
    if fault.kind == "broken":
        # Half of what is missing arrives each time.
        assert server.ranges() == [f"bytes={len(DATA) - len(DATA) // 2**tries}-" for tries in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (Fault("train.parquet", "mute"), "hub-unreachable", "what arrived is kept"),
        (Fault("train.parquet", "ranges"), "hub-unreachable", "what arrived is kept"),
        (Fault("train.parquet", "wrong"), "hub-damaged", "is not what the Hub lists"),
        (Fault("README.md", "wrong"), "hub-damaged", "is not what the Hub lists"),
        (Fault("train.parquet", "pointer"), "hub-damaged", "is a Git-LFS pointer"),
        (Fault("/resolve/", 429, headers={"Retry-After": "0"}), "hub-unreachable", "429"),
        (Fault("/revision/", 429, headers={"Retry-After": "3600"}), "hub-unreachable", "asks to wait 3600 s"),
        (Fault("/resolve/", 429, headers={"RateLimit": '"resolvers";r=0;t=299'}), "hub-unreachable", "asks to wait 299 s"),
        (Fault("/resolve/", 500, body=b"as you sent it: Bearer " + TOKEN.encode()), "hub-unreachable", "Bearer ***"),
        (Fault("/revision/", 200, body=b"<html>Log in to the network</html>"), "hub-unreachable", "does not answer as the Hub does"),
        (Fault("/revision/", 200, body=b"[]"), "hub-unreachable", "does not answer as the Hub does"),
        (Fault("/tree/", 200, body=b'[{"type": "file"}]'), "hub-unreachable", "does not answer as the Hub does"),
    ],
    ids=lambda value: f"{value.place.strip('/')}-{value.kind}" if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_ends_with_one_message_and_no_file(server: FakeHub, tmp_path: Path, fault: Fault, code: str, says: str) -> None:
    server.faults.append(fault)
    with pytest.raises(MachineError) as error:
        fetched(tmp_path, "README.md" if fault.place == "README.md" else "train.parquet")
    assert error.value.code == code
    assert says in error.value.message
    assert TOKEN not in error.value.message
    assert "Signature" not in error.value.message
    assert all(name.endswith(".partial") for name in left(tmp_path))
    if code == "hub-damaged":
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/revision/", 500),
        Fault("/revision/", 404),
        Fault("/revision/", 200, body=b"[]"),
        Fault("/resolve/", 429, headers={"Retry-After": "3600"}),
        Fault("train.parquet", "wrong"),
    ],
    ids=lambda fault: f"{fault.place.strip('/')}-{fault.kind}",
)
@pytest.mark.parametrize("password", ["word", "half@word"])
def test_a_password_in_the_address_is_in_no_message(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, password: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint.replace("//", f"//someone:{password}@"))
    server.faults.append(fault)
    with pytest.raises((InputError, MachineError)) as error:
        fetched(tmp_path)
    assert server.endpoint in error.value.message
    assert not any(part in error.value.message for part in ("someone", "half", "word@"))


@pytest.mark.parametrize("address", ["http://someone:half?word@mirror", "http://someone:half/word@mirror", "http://someone:half@word@mirror"])
def test_a_password_is_taken_out_of_an_error_whatever_it_holds(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert hub.plain(ValueError(f"no answer from '{address}/api/models?page=2'")) == "no answer from 'http://mirror/api/models'"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("/resolve/", 401), "hub-denied"),
        (Fault("/resolve/", 403), "hub-denied"),
        (Fault("/resolve/", 403, headers={"X-Error-Code": "GatedRepo"}), "hub-gated"),
        (Fault("/resolve/", 404, headers={"X-Error-Code": "EntryNotFound"}), "hub-not-found"),
        (Fault("/revision/", 401, headers={"X-Error-Code": "RepoNotFound"}), "hub-not-found"),
        (Fault("/revision/", 404, headers={"X-Error-Code": "RevisionNotFound"}), "hub-not-found"),
    ],
    ids=lambda value: f"{value.place.strip('/')}-{value.kind}" if isinstance(value, Fault) else value,
)
def test_what_the_account_may_not_have_is_its_users_to_mend(server: FakeHub, tmp_path: Path, fault: Fault, code: str) -> None:
    server.faults.append(fault)
    with pytest.raises(InputError, match=rf"\[{code}\]"):
        fetched(tmp_path)
    assert not (tmp_path / "file").exists()


def test_another_call_goes_on_where_the_first_was_cut_off(server: FakeHub, tmp_path: Path) -> None:
    server.faults += [Fault("train.parquet", "broken", times=1), Fault("train.parquet", "mute", times=3)]
    with pytest.raises(MachineError, match="hub-unreachable"):
        fetched(tmp_path)
    server.asked.clear()
    assert fetched(tmp_path) == DATA
    assert server.ranges() == [f"bytes={len(DATA) // 2}-"]


def test_what_is_left_of_other_bytes_is_never_gone_on_with(server: FakeHub, tmp_path: Path) -> None:
    server.faults += [Fault("train.parquet", "broken", times=1), Fault("train.parquet", "mute", times=3)]
    with pytest.raises(MachineError, match="hub-unreachable"):
        fetched(tmp_path)
    server.repositories["datasets", "org/name"].files["train.parquet"] = other = DATA[::-1]
    assert fetched(tmp_path) == other


def test_a_damaged_partial_file_costs_one_run_not_a_wrong_file(server: FakeHub, tmp_path: Path) -> None:
    file = hub.read_commit("org/name", COMMIT, "dataset").files[1]
    (tmp_path / f"file.{file.digest[:16]}.partial").write_bytes(b"damaged by the disk")
    with pytest.raises(MachineError, match="hub-damaged"):
        fetched(tmp_path)
    assert left(tmp_path) == []
    assert fetched(tmp_path) == DATA


def test_a_wrong_file_in_its_place_is_replaced(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:-1] + b"!")
    assert fetched(tmp_path) == DATA


def test_a_pointer_that_the_repository_itself_holds_is_refused(server: FakeHub, tmp_path: Path) -> None:
    server.repositories["datasets", "org/name"].files["rows.jsonl"] = pointer(DATA)
    with pytest.raises(InputError, match=r"\[hub-pointer\]"):
        fetched(tmp_path, "rows.jsonl")
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["../escaped.jsonl", "/etc/passwd", "a/../../b.jsonl", "a\\b.jsonl", "line\nbreak.jsonl", "a//b.jsonl"])
def test_a_name_that_leads_out_of_the_folder_is_refused(server: FakeHub, name: str) -> None:
    server.repositories["datasets", "org/name"].files[name] = b"{}"
    with pytest.raises(InputError, match=r"\[hub-path\]"):
        hub.read_commit("org/name", COMMIT, "dataset")


def test_a_mirror_that_gives_another_commit_is_refused(server: FakeHub) -> None:
    server.sha = "f" * 40
    with pytest.raises(MachineError, match="it answers with the commit ffff"):
        hub.read_commit("org/name", COMMIT, "dataset")


@pytest.mark.parametrize("name", ["a/b/c", "a--b/c", "-a/b", "a/b.git"])
def test_a_name_that_no_repository_can_have_is_refused_unasked(server: FakeHub, name: str) -> None:
    with pytest.raises(InputError, match=r"\[hub-name\]"):
        hub.read_commit(name, COMMIT, "dataset")
    assert server.asked == []


def test_a_server_that_says_nothing_is_left_in_time(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    # Nobody accepts: the connection stands, and no answer comes.
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(MachineError, match="hub-unreachable"):
            hub.read_commit("org/name", COMMIT, "dataset")


def test_a_download_below_the_least_rate_ends_and_resumes(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WINDOW_SECONDS", 0.3)
    server.faults.append(Fault("train.parquet", "dribble", times=1))
    # The first window holds the half that came at once.
    with pytest.raises(MachineError, match=r"\[hub-slow\] org/name: train.parquet: .* sent \d+ bytes in 0 s; .*Run again to resume"):
        fetched(tmp_path)
    assert len(DATA) // 2 < (tmp_path / left(tmp_path)[0]).stat().st_size < len(DATA)
    server.asked.clear()
    assert fetched(tmp_path) == DATA
    assert int(server.ranges()[0].strip("bytes=-")) > len(DATA) // 2


def test_connections_that_bring_a_few_bytes_each_do_not_go_on_for_ever(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "LEAST_PROGRESS_BYTES", len(DATA))
    server.faults.append(Fault("train.parquet", "broken"))
    with pytest.raises(MachineError, match=r"\[hub-unreachable\] org/name: train.parquet: "):
        fetched(tmp_path)
    assert len([request for request in server.asked if request.on_cdn]) == hub.ATTEMPTS


def test_a_file_with_more_bytes_than_listed_ends_at_once(server: FakeHub, tmp_path: Path) -> None:
    server.faults.append(Fault("train.parquet", "endless"))
    with pytest.raises(MachineError, match=r"\[hub-damaged\] org/name: train.parquet: "):
        fetched(tmp_path)
    assert left(tmp_path) == []


def test_offline_is_said_to_be_the_reason(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE"):
        hub.read_commit("org/name", COMMIT, "dataset")


@pytest.mark.parametrize("address", ["http://me:half/word@host", "ftp://host", "host"])
def test_an_address_that_is_none_is_one_message_without_it(address: str) -> None:
    environment = {**os.environ, "HF_ENDPOINT": address}
    command = [sys.executable, "-m", "tools.fetch", "org/name", "--revision", "0" * 40]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "[hub-endpoint]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "half" not in done.stdout + done.stderr
