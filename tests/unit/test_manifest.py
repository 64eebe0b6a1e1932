import json
import os
import shutil
from pathlib import Path

import pytest

from qlora.core.errors import InputError, MachineError
from qlora.core.files import write_json
from qlora.model import manifest
from qlora.model.manifest import check_vocabulary, find_weights, make_manifest, read_manifest, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text("{}", encoding="utf-8")
    (made / "pytorch_model.bin").write_bytes(b"a pickle, which nothing loads")
    return made


def test_a_manifest_holds_size_and_sha256_of_what_loading_reads(folder: Path) -> None:
    made = make_manifest(folder)
    assert list(made.files) == ["config.json", "model.safetensors"]
    # sha256sum of the bytes "{}"
    assert made.files["config.json"] == {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    assert str(folder) not in json.dumps(made.record())


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="base-model-no-weights"):
        make_manifest(folder)


def test_unchanged_files_are_hashed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_manifest(folder)
    verify(made, folder, tmp_path / "memory.json")
    monkeypatch.setattr(manifest, "sha256_of", lambda path: pytest.fail(f"hashed {path} again"))
    verify(made, folder, tmp_path / "memory.json")


def test_a_changed_byte_is_seen_even_with_its_mtime_restored(folder: Path, tmp_path: Path) -> None:
    made = make_manifest(folder)
    path = folder / "model.safetensors"
    verify(made, folder, tmp_path / "memory.json")
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"model.safetensors has sha256 .* the manifest says"):
        verify(made, folder, tmp_path / "memory.json")


def test_missing_and_foreign_files_are_all_named(folder: Path, tmp_path: Path) -> None:
    made = make_manifest(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError) as caught:
        verify(made, folder, tmp_path / "memory.json")
    assert "model.safetensors is missing" in str(caught.value)
    assert "other.safetensors is not in the manifest" in str(caught.value)


def test_a_damaged_memory_is_made_anew(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    memory.write_text("[", encoding="utf-8")
    verify(make_manifest(folder), folder, memory)
    assert str(folder / "config.json") in memory.read_text(encoding="utf-8")


def test_a_manifest_reads_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    made = make_manifest(folder, "org/name", "a" * 40)
    write_json(tmp_path / "name.json", made.record())
    assert read_manifest(tmp_path / "name.json") == made


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": {}}}', '{"files": 3}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "name.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="base-model-manifest"):
        read_manifest(tmp_path / "name.json")


def test_an_unpinned_model_says_how_to_pin_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python -m tools.pin name --path DIR"):
        read_manifest(tmp_path / "name.json")


def test_weights_are_found_in_the_repository_that_dvc_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "repository"
    (root / "models" / "base").mkdir(parents=True)
    (root / "models" / "base" / "name").symlink_to(folder)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert find_weights("name", make_manifest(folder)).samefile(folder)


def test_absent_weights_name_the_commands_that_bring_them(folder: Path) -> None:
    with pytest.raises(InputError, match=r"tools.pin absent --repo-id org/name --revision a{40}"):
        find_weights("absent", make_manifest(folder, "org/name", "a" * 40))


def test_a_token_without_an_embedding_is_found_before_anything_runs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree("models/base/tiny", folder)
    check_vocabulary(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "content": "<|new|>", "id": 60_000})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match=r"\[base-model-vocabulary\] 1 tokens of .*such as '<\|new\|>', have ids beyond the model's \d+ embeddings"):
        check_vocabulary(folder)
    (folder / "tokenizer.json").unlink()
    check_vocabulary(folder)


def test_a_pipe_among_the_files_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(MachineError, match=r"file-access\] .*tokenizer.json is a pipe or a device"):
        make_manifest(folder)
