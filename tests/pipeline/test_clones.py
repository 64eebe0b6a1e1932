"""The same bytes and no finding in other kinds of checkouts, with other kinds of names."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from qlora.core.errors import InputError
from qlora.data.readers import files_of
from tests.pipeline.clone import Clone

NAMES = {form: unicodedata.normalize(form, "données é.jsonl") for form in ("NFC", "NFD")}


def silent(clone: Clone) -> bool:
    return "nothing found" in clone.run("python", "-m", "tools.doctor")


def same_as(clone: Clone, other: Clone) -> bool:
    return clone.outputs() == other.outputs() and (clone.path / "dvc.lock").read_bytes() == (other.path / "dvc.lock").read_bytes()


def test_a_checkout_that_changes_the_ends_of_lines_elsewhere_changes_none_here(built: Clone, tmp_path: Path) -> None:
    built.run("git", "-c", "core.autocrlf=true", "clone", "--quiet", str(built.path), str(tmp_path / "windows"))
    windows = Clone(tmp_path / "windows")
    windows.run("git", "config", "core.autocrlf", "true")
    windows.run("git", "rm", "--quiet", "-r", "--cached", ".")
    windows.run("git", "reset", "--quiet", "--hard")
    for name in filter(None, built.run("git", "ls-files", "-z").split("\0")):
        assert (windows.path / name).read_bytes() == (built.path / name).read_bytes(), name


def test_two_clones_on_one_cache_share_runs(built: Clone, tmp_path: Path) -> None:
    """What the one ran, the other takes from the cache; what each removes of its own, the other keeps."""
    cache = tmp_path / "cache"
    shutil.copytree(built.path / ".dvc/cache", cache)
    built.run("dvc", "cache", "dir", "--local", str(cache))
    shutil.rmtree(built.path / ".dvc/cache")
    built.run("git", "clone", "--quiet", str(built.path), str(tmp_path / "second"))
    second = Clone(tmp_path / "second")
    second.run("dvc", "cache", "dir", "--local", str(cache))
    second.run("dvc", "checkout", "--quiet")
    assert second.repro() == set()
    assert same_as(second, built)

    second.set(evaluate__resamples=1001)
    assert second.repro() == {"evaluate"}
    built.set(evaluate__resamples=1001)
    assert built.repro() == set()
    assert same_as(second, built)
    for clone in (built, second):
        assert silent(clone)
        clone.run("python", "-m", "tools.verify")


def test_a_worktree_is_a_checkout_like_any_other(built: Clone, tmp_path: Path) -> None:
    built.run("git", "worktree", "add", "--quiet", "-b", "other", str(tmp_path / "worktree"))
    worktree = Clone(tmp_path / "worktree")
    worktree.run("dvc", "cache", "dir", "--local", str(built.path / ".dvc/cache"))
    worktree.run("dvc", "checkout", "--quiet")
    assert worktree.repro() == set()
    worktree.set(evaluate__resamples=1001)
    assert worktree.repro() == {"evaluate"}
    assert silent(worktree)
    assert silent(built)
    assert built.repro() == set()


@pytest.mark.parametrize("form", NAMES)
def test_names_in_either_form_of_unicode_are_read_hashed_and_found(built: Clone, form: str) -> None:
    raw = built.path / "data/raw/micro"
    path = f"data/raw/micro/{NAMES[form]}"
    shutil.copy(raw / "train.jsonl", built.path / path)
    built.set(data__train_file=path)
    built.run("git", "add", "--force", path)
    assert built.repro("prepare") == {"prepare"}
    assert built.repro("prepare") == set()
    built.run("python", "-m", "tools.verify")
    assert silent(built)
    assert path in json.dumps(built.json("reports/prepare.json"), ensure_ascii=False) or path in (built.path / "dvc.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize(("asked", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_the_other_form_of_unicode_is_pointed_out(tmp_path: Path, asked: str, there: str) -> None:
    (tmp_path / NAMES[there]).write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"\[data-missing\].*a file whose name looks the same is there"):
        files_of(tmp_path / NAMES[asked])
