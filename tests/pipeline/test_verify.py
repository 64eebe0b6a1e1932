"""One changed byte is seen, wherever it is, by `tools.verify` and by the stage that would read it."""

import shutil
from pathlib import Path

import pytest

from qlora.core.dvc_lock import cache_folder, cached, is_committed, md5_of, objects, outputs_in_git, recorded, recorded_outputs, require_recorded
from qlora.core.errors import InputError
from tests.helpers import files_of, flip
from tests.pipeline.clone import Clone
from tools.verify import differences


def wrong() -> dict[str, str]:
    return {place: difference for place, difference in differences() if difference}


def test_one_flipped_byte_in_any_file_is_named(inside: Clone) -> None:
    """Every output, every object of the cache behind it, raw data and base model, file by file."""
    assert wrong() == {}
    tried = 0
    kinds = set()
    for path in sorted({entry.path for entry in recorded() if entry.is_output or entry.path.startswith(("data/", "models/"))}):
        for file in files_of(Path(path)):
            content = file.read_bytes()
            flip(file)
            assert path in wrong(), file
            file.chmod(0o644)
            file.write_bytes(content)
            tried += 1
            kinds.add(path.partition("/")[0])
    for path, md5 in recorded_outputs().items():
        for part in objects(md5) if path not in outputs_in_git() else ():
            place = cached(part)
            content = place.read_bytes()
            flip(place)
            assert str(place) in wrong()
            place.chmod(0o644)
            place.write_bytes(content)
            tried += 1
            kinds.add("cache")
    for file in files_of(Path("models/base/tiny")):
        if file.suffix == ".py":
            continue
        content = file.read_bytes()
        flip(file)
        assert "base model tiny" in wrong()
        file.write_bytes(content)
        tried += 1
        kinds.add("base model")
    assert wrong() == {}
    assert kinds == {"data", "models", "metrics", "reports", "cache", "base model"}
    assert tried > 35


def test_what_is_missing_is_named(inside: Clone) -> None:
    Path("reports/train.json").unlink()
    lost = cached(recorded_outputs()["models/adapter"])
    lost.unlink()
    found = wrong()
    assert "is missing" in found["reports/train.json"]
    assert "is missing in the cache, part of models/adapter" in found[str(lost)]


def test_the_command_ends_with_2_and_names_it(inside: Clone) -> None:
    assert "are as they were made" in inside.run("python", "-m", "tools.verify")
    flip(inside.path / "metrics/evaluate.json")
    output = inside.run("sh", "-c", "python -m tools.verify; echo status $?")
    assert "[verify-differs] 1 of" in output
    assert "metrics/evaluate.json has the md5" in output
    assert "status 2" in output
    shutil.copy(inside.path / "dvc.lock", inside.path / "kept")
    (inside.path / "dvc.lock").unlink()
    assert "[verify-nothing]" in inside.run("python", "-m", "tools.verify", fails=True)
    (inside.path / "dvc.lock").write_text("stages: [1", encoding="utf-8")
    assert "[lock-damaged]" in inside.run("python", "-m", "tools.verify", fails=True)


def test_a_stage_refuses_what_was_changed_after_it_was_made(inside: Clone) -> None:
    """Remembered by size, times and inode; a change with its time put back is seen all the same."""
    paths = [Path("data/prepared/train.jsonl"), Path("models/adapter"), Path("data/predictions/base_counts.json")]
    require_recorded(paths)
    memory = (inside.path / ".dvc/tmp/inputs.json").read_bytes()
    require_recorded(paths)
    assert (inside.path / ".dvc/tmp/inputs.json").read_bytes() == memory
    require_recorded([Path("params.yaml"), Path("data/prepared/absent.jsonl")])
    for path in paths:
        file = files_of(path)[0]
        content = file.read_bytes()
        flip(file)
        with pytest.raises(InputError, match=rf"input-changed\] {path} has the md5 .*dvc checkout --force {path}"):
            require_recorded(paths)
        file.chmod(0o644)
        file.write_bytes(content)
        require_recorded(paths)


def test_hashes_are_those_of_dvc(inside: Clone) -> None:
    outputs = recorded_outputs()
    assert len(outputs) > 12
    for path, md5 in outputs.items():
        assert md5_of(Path(path)) == md5, path
    # A folder of code, in which Python leaves what DVC ignores.
    Path("qlora/data/formats/__pycache__").mkdir(exist_ok=True)
    Path("qlora/data/formats/__pycache__/new.cpython-311.pyc").write_bytes(b"compiled")
    Path("qlora/data/formats/half.partial").write_bytes(b"half")
    for entry in recorded():
        assert md5_of(Path(entry.path)) == entry.md5, entry.path
    assert is_committed(Path("models/adapter"), "models/adapter", outputs)
    assert is_committed(Path("models/adapter"), "models/adapter", {}), "the cache holds it"
    flip(Path("models/adapter/adapter_model.safetensors"))
    assert not is_committed(Path("models/adapter"), "models/adapter", outputs)


def test_data_that_lies_elsewhere_is_looked_at_too(inside: Clone) -> None:
    Path("corpus").mkdir()
    shutil.copy("data/raw/micro/train.jsonl", "corpus/rows.jsonl")
    inside.set(data__train_file="corpus/rows.jsonl")
    inside.repro("prepare")
    assert "corpus/rows.jsonl" not in wrong()
    flip(Path("corpus/rows.jsonl"))
    assert "corpus/rows.jsonl" in wrong()


@pytest.mark.parametrize("level", ["--system", "--global", "--project", "--local"])
def test_the_cache_is_where_dvc_has_it(inside: Clone, tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_SYSTEM_CONFIG_DIR", "DVC_GLOBAL_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        inside.environment[name] = str(tmp_path / name)
    elsewhere = tmp_path / "50%shared" / "cache"
    inside.run("dvc", "cache", "dir", level, str(elsewhere))
    assert cache_folder() == Path(inside.run("dvc", "cache", "dir").strip()) == elsewhere
