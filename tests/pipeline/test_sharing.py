"""What one clone pushes another one pulls, from a folder and from a real S3 server, and nothing runs there again."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora.core.dvc_lock import recorded
from tests.pipeline.clone import Clone

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
KEYS = {"AWS_ACCESS_KEY_ID": "key-of-a-test", "AWS_SECRET_ACCESS_KEY": "secret-of-a-test", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """A remote's objects, and what a clone is told of it."""

    def __init__(
        self, url: str, settings: dict[str, str], damage: Callable[[str], object], remove: Callable[[str], object], environment: dict[str, str]
    ) -> None:
        self.url, self.settings, self.damage, self.remove, self.environment = url, settings, damage, remove, environment

    def tell(self, clone: Clone, **settings: str) -> None:
        """As docs/experiments.md says: of this user alone, no key in a file."""
        clone.environment.update(self.environment)
        clone.run("dvc", "remote", "add", "--local", "--default", "--force", "store", self.url)
        for name, value in {**self.settings, **settings}.items():
            clone.run("dvc", "remote", "modify", "--local", "store", name, value)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of a server that speaks S3, a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        host, port = server.stdout.readline().split()
        yield f"http://{host}:{port}"
        server.stdin.close()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        folder = tmp_path / "store"

        def damage_file(md5: str) -> None:
            place = folder / "files/md5" / md5[:2] / md5[2:]
            place.chmod(0o644)
            place.write_bytes(b"rotten")
            place.chmod(0o444)

        return Store(str(folder), {}, damage_file, lambda md5: (folder / "files/md5" / md5[:2] / md5[2:]).unlink(), {})
    boto3 = pytest.importorskip("boto3")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    address = request.getfixturevalue("s3")
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="bucket")
    return Store(
        "s3://bucket/qlora",
        {"endpointurl": address},
        lambda md5: client.put_object(Bucket="bucket", Key=f"qlora/files/md5/{md5[:2]}/{md5[2:]}", Body=b"rotten"),
        lambda md5: client.delete_object(Bucket="bucket", Key=f"qlora/files/md5/{md5[:2]}/{md5[2:]}"),
        KEYS,
    )


def cloned(one: Clone, path: Path) -> Clone:
    one.run("git", "clone", "--quiet", f"file://{one.path}", str(path))
    return Clone(path)


def test_a_clone_takes_what_another_pushed_and_a_damaged_object_is_refused(built: Clone, store: Store, tmp_path: Path) -> None:
    store.tell(built)
    built.run("dvc", "push")
    assert built.run("git", "status", "--porcelain") == "", "a remote of one user is in nobody else's repository"

    two = cloned(built, tmp_path / "two")
    store.tell(two, verify="true")
    two.run("dvc", "pull")
    assert two.repro() == set()
    assert "up to date" in two.run("dvc", "status")
    assert two.outputs() == built.outputs()
    assert two.run("git", "status", "--porcelain") == ""
    assert "secret-of-a-test" not in (two.path / ".dvc/config.local").read_text(encoding="utf-8")

    outputs = {entry.path: entry.md5 for entry in recorded(built.path / "dvc.lock") if entry.is_output}
    md5 = outputs["data/predictions/base.jsonl"]
    store.damage(md5)
    trusting, wary = cloned(built, tmp_path / "trusting"), cloned(built, tmp_path / "wary")
    store.tell(trusting)
    trusting.run("dvc", "pull")
    assert (trusting.path / "data/predictions/base.jsonl").read_bytes() == b"rotten", "what `verify` is for"
    store.tell(wary, verify="true")
    shown = wary.run("dvc", "pull", fails=True)
    assert "base.jsonl" in shown
    assert not (wary.path / "data/predictions/base.jsonl").exists()
    # What is damaged is taken out; who has it whole pushes it anew.
    store.remove(md5)
    built.run("dvc", "push")
    wary.run("dvc", "pull")
    assert wary.repro() == set()
    assert wary.outputs() == built.outputs()
