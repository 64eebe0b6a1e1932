"""Fetching a dataset: real files, real git and dvc, and a server on this machine that speaks the Hub's protocol."""

import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from qlora.core.dvc_lock import md5_of
from qlora.core.errors import InputError, MachineError
from qlora.data.readers import Columns, read_batches
from qlora.runtime.locks import try_lock
from tests.hub import COMMIT, TOKEN, FakeHub, Fault, Repository, serving_this_process, sha256
from tools import doctor, fetch

ROOT = Path(__file__).parents[2]
FOLDER = Path("data/raw/name")
Call = Callable[..., str]


def parquet(count: int) -> bytes:
    rows = [{"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "!"}]} for number in range(count)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
FILES = {TRAIN: parquet(2000), TEST: parquet(20), "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n", ".gitattributes": b"*.parquet filter=lfs\n"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository of Git and DVC with this one's settings."""
    root = tmp_path / "root"
    (root / ".dvc").mkdir(parents=True)
    for name in (".gitignore", ".dvcignore", ".dvc/config"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "--quiet", root], check=True)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving_this_process(monkeypatch) as state:
        state.repositories["datasets", "org/name"] = Repository(dict(FILES), {"license": "cc-by-nc-4.0"}, gated=True)
        yield state


@pytest.fixture
def call(root: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command; what it printed. The token must be in none of that, and in no file."""

    def run(*arguments: str, repo_id: str = "org/name") -> str:
        monkeypatch.setattr("sys.argv", ["fetch", repo_id, "--revision", COMMIT, *arguments])
        said = ""
        try:
            fetch.main()
        except (InputError, MachineError) as error:
            said = str(error)
            raise
        finally:
            shown = capfd.readouterr()
            assert TOKEN not in shown.out + shown.err + said
            assert [path for path in root.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
        return shown.out

    return run


def seen_by_git() -> set[str]:
    return set(subprocess.run(["git", "ls-files", "-o", "--exclude-standard", "data"], capture_output=True, text=True, check=True).stdout.split())


def test_a_data_set_comes_to_its_place_with_its_source_and_is_tracked(call: Call, server: FakeHub) -> None:
    server.faults += [Fault(TRAIN, "broken", times=2), Fault(TRAIN, 429, times=1, headers={"Retry-After": "0"}), Fault("README.md", "mute", times=1)]
    shown = call()
    assert f"data.train_file: {FOLDER / TRAIN}\n" in shown
    assert f"data.test_file: {FOLDER / TEST}\n" in shown
    assert sum(len(batch.rows().rows) for batch in read_batches(FOLDER / TRAIN, Columns({"messages": ("messages",)}, {}))) == 2000
    record = json.loads(Path("data/raw/name.source.json").read_text(encoding="utf-8"))
    names = [TRAIN, TEST, "README.md"]
    assert record == {
        "repo_id": "org/name",
        "revision": COMMIT,
        "license": "cc-by-nc-4.0",
        "files": {name: {"bytes": len(FILES[name]), "sha256": sha256(FILES[name])} for name in names},
    }
    assert sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()) == sorted(names)
    assert YAML(typ="safe").load(Path("data/raw/name.dvc"))["outs"][0]["md5"] == md5_of(FOLDER)
    tracked = {"data/raw/name.dvc", "data/raw/name.source.json", "data/raw/.gitignore"}
    assert seen_by_git() == tracked
    assert set(shown.partition("`git add ")[2].partition("`")[0].split()) == tracked
    assert sorted(path.name for path in Path("data/raw").iterdir() if path.name != ".gitignore") == ["name", "name.dvc", "name.source.json"]
    assert not any("authorization" in request.headers for request in server.asked if request.on_cdn)

    # Again: nothing is downloaded, nothing changes.
    server.asked.clear()
    before = Path("data/raw/name.dvc").read_bytes()
    call()
    assert not any("/resolve/" in request.path for request in server.asked)
    assert Path("data/raw/name.dvc").read_bytes() == before


def test_a_branch_is_looked_up_once_and_its_commit_written(call: Call, server: FakeHub) -> None:
    shown = call("--revision", "main")
    assert f"at {COMMIT}. Now" in shown
    assert json.loads(Path("data/raw/name.source.json").read_text(encoding="utf-8"))["revision"] == COMMIT
    assert [request.path for request in server.asked if "main" in request.path] == ["/api/datasets/org/name/revision/main"]
    with pytest.raises(InputError, match=r"hub-not-found\] the Hub has no org/name at v2"):
        call("--revision", "v2")


@pytest.mark.parametrize("kind", ["mute", "wrong", "pointer", 401, 404])
def test_a_failure_leaves_nothing_that_a_stage_would_take(call: Call, server: FakeHub, kind: int | str) -> None:
    server.faults += [Fault(TRAIN, "broken", times=1), Fault(TRAIN, kind)]
    with pytest.raises((InputError, MachineError)):
        call()
    assert [path.name for path in Path("data/raw").iterdir() if not path.name.startswith(".")] == []
    assert seen_by_git() == set()


def test_what_was_cut_off_goes_on_when_run_again(call: Call, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "track", lambda folder: None)
    server.faults += [Fault(TRAIN, "broken", times=1), Fault(TRAIN, 403)]
    with pytest.raises(InputError, match="hub-denied"):
        call()
    # Not one of the half-written files that the doctor would have removed unasked.
    (found,) = doctor.left_behind()
    assert "resumes it" in found.what
    assert found.is_note
    assert found.fix.startswith("rm -rf data/raw/.name.fetch ")
    server.faults.clear()
    server.asked.clear()
    call()
    assert server.ranges() == [f"bytes={len(FILES[TRAIN]) // 2}-"]
    assert (FOLDER / TRAIN).read_bytes() == FILES[TRAIN]
    # README.md and the test split had arrived whole.
    assert [request.path.partition("?")[0].rpartition("/")[2] for request in server.asked if request.on_cdn] == [Path(TRAIN).name]


def test_what_lies_there_is_replaced_only_when_told_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "track", lambda folder: None)
    (FOLDER / "data").mkdir(parents=True)
    (FOLDER / "mine.jsonl").write_text("{}\n", encoding="utf-8")
    (FOLDER / TEST).write_bytes(FILES[TEST][:-1] + b"!")
    with pytest.raises(InputError, match=r"\[fetch-occupied\]") as error:
        call()
    assert all(said in str(error.value) for said in (f"{TRAIN} is missing", "mine.jsonl is not among them", f"{TEST} has other bytes"))
    assert (FOLDER / "mine.jsonl").is_file()
    subprocess.run(["git", "add", "--force", FOLDER / "mine.jsonl"], check=True)
    with pytest.raises(InputError, match=r"\[fetch-occupied\]"):
        call("--force")
    subprocess.run(["git", "rm", "--quiet", "--cached", FOLDER / "mine.jsonl"], check=True)
    call("--force")
    assert not (FOLDER / "mine.jsonl").exists()
    assert (FOLDER / TEST).read_bytes() == FILES[TEST]


@pytest.mark.parametrize("name", ["name.dvc", "name.source.json"])
def test_what_says_where_other_data_are_from_stays_unless_git_has_it(call: Call, name: str) -> None:
    path = Path("data/raw", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("outs: []\n", encoding="utf-8")
    for arguments in ((), ("--force",)):
        with pytest.raises(InputError, match=rf"^\[occupied\] {path} holds something else"):
            call(*arguments)
    assert path.read_text(encoding="utf-8") == "outs: []\n"
    assert not FOLDER.exists()
    subprocess.run(["git", "add", "--force", path], check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "pointer"], check=True)
    call()
    assert (FOLDER / TEST).exists()


def test_a_fetch_that_is_ended_leaves_no_manifest_of_other_data(call: Call, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "track", lambda folder: None)
    call()
    server.repositories["datasets", "org/name"].files[TEST] = other = parquet(21)

    def ended(path: Path, record: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "write_own_json", ended)
        with pytest.raises(KeyboardInterrupt):
            call("--force")
    assert (FOLDER / TEST).read_bytes() == other
    assert not Path("data/raw/name.source.json").exists()
    call()
    assert json.loads(Path("data/raw/name.source.json").read_text(encoding="utf-8"))["files"][TEST]["sha256"] == sha256(other)


def test_a_manifest_is_written_while_no_other_fetch_may_change_the_folder(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "track", lambda folder: None)
    free = []
    monkeypatch.setattr(fetch, "write_own_json", lambda path, record: free.append(try_lock(Path("data/raw/.name.lock"))))
    call()
    assert free == [None]


def test_some_files_can_have_a_folder_of_their_own(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "track", lambda folder: None)
    shown = call("--files", "data/train-*", "--name", "name-train")
    assert [path.name for path in Path("data/raw/name-train").rglob("*") if path.is_file()] == [Path(TRAIN).name]
    assert f"data/raw/name-train/{TRAIN}" in shown
    with pytest.raises(InputError, match=r"\[fetch-nothing\].*README\.md"):
        call("--files", "*.csv")


@pytest.mark.parametrize("path", ["dvc.yaml", "data/dvc.yaml", "data/train.parquet.dvc"])
def test_a_file_that_dvc_would_read_is_refused(call: Call, server: FakeHub, path: str) -> None:
    """A damaged one would stop every `dvc repro` of the project."""
    server.repositories["datasets", "org/name"].files[path] = b"outs: ["
    with pytest.raises(InputError, match=rf"\[hub-path\] org/name lists '{path}', which DVC would read"):
        call()
    assert not FOLDER.exists()
    assert "holds org/name" in call("--files", "*.parquet")


def test_a_dvc_that_fails_costs_no_second_download(call: Call, server: FakeHub) -> None:
    settings = Path(".dvc/config").read_bytes()
    Path(".dvc/config").write_text("no settings", encoding="utf-8")
    with pytest.raises(MachineError, match=r"\[fetch-dvc\]"):
        call()
    Path(".dvc/config").write_bytes(settings)
    server.asked.clear()
    call()
    assert Path("data/raw/name.dvc").is_file()
    assert not any("/resolve/" in request.path for request in server.asked)


def test_two_at_once_do_not_mix(call: Call) -> None:
    Path("data/raw").mkdir(parents=True)
    lock = try_lock(Path("data/raw/.name.lock"))
    assert lock is not None
    with lock, pytest.raises(MachineError, match=r"\[fetch-running\]"):
        call()


def test_a_wrong_place_or_name_is_refused_unasked(call: Call, root: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\[fetch-name\]"):
        call("--name", "../elsewhere")
    (root / "below").mkdir()
    monkeypatch.chdir(root / "below")
    with pytest.raises(InputError, match=r"\[fetch-dvc\]"):
        call()
    assert server.asked == []
