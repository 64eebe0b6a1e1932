import os
from pathlib import Path

import pytest

from qlora import params
from qlora.core.dvc_lock import locked_stages, md5_of, params_values, pipeline_stages
from qlora.core.errors import MachineError
from qlora.core.files import atomic_writers, read_jsonl, read_record, update_json, write_csv, write_json, write_jsonl
from qlora.core.hashing import sha256_of


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    old, new = tmp_path / "a.json", tmp_path / "b.json"
    old.write_text("old", encoding="utf-8")

    def half_way() -> None:
        with atomic_writers([old, new]) as (first, _):
            first.write(b"new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half_way()
    assert old.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    """Closing a file fails there too, after writing did."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")

    def fill() -> None:
        with atomic_writers([tmp_path / "a", tmp_path / "b"]) as files:
            files[0].close()
            files[0] = open("/dev/full", "wb")  # noqa: SIM115 - closed by atomic_writers
            files[0].write(b"x" * 10)

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_json_is_sorted_ends_in_a_line_break_and_is_not_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": "é", "a": 0.1})
    assert path.read_text(encoding="utf-8") == '{\n  "a": 0.1,\n  "b": "é"\n}\n'


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_line_separators_inside_text_stay_inside_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "a\u2028b\n\r\x85"}, {"text": "日本"}]
    write_jsonl(path, records)
    assert read_jsonl(path) == records
    assert path.read_bytes().count(b"\n") == 2


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, ["step", "loss"], [[1, 0.5]])
    assert path.read_bytes() == b"step,loss\n1,0.5\n"


def test_a_text_in_a_csv_is_no_formula_and_no_markup(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["name", "value"], [(text, -1) for text in ("=1+1", "+1", "-1", "@a", "\ta", "a=b", "</script>")])
    rows = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert rows == ["'=1+1,-1", "'+1,-1", "'-1,-1", "'@a,-1", "'\\x09a,-1", "a=b,-1", "＜/script>,-1"]


@pytest.mark.parametrize("before", ['{"a": NaN}', '{"a": "\\ud800"}', "[]", "{"])
def test_a_memory_that_cannot_be_written_again_is_begun_anew(tmp_path: Path, before: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(before, encoding="utf-8")
    update_json(path, "b", {"sha256": "x"})
    assert read_record(path) == {"b": {"sha256": "x"}}


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = Path("dvc.lock")
    os.mkfifo(pipe)
    for read in (md5_of, sha256_of, locked_stages, pipeline_stages, params_values, params.load):
        with pytest.raises(MachineError, match=r"file-access\] dvc.lock is a pipe or a device"):
            read(pipe)
    assert read_record(pipe) == {}
