"""No tool replaces what it did not write."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.core.errors import InputError
from tests.pipeline.clone import Clone
from tools import doctor

WRITING = {
    "card": (("reports/model_card.md", "reports/environment.json"), ()),
    "verify": (("reports/reproduction.json",), ("--rerun", "evaluate")),
    "inspect": (("tokens.html",), ("--count", "1", "--html", "tokens.html")),
    "merge": (("metrics/merge.json", "models/merged", "models/merged.pending"), ("--num-examples", "1")),
    "pin": (("models/base/tiny2.json",), ("tiny2", "--path", "models/base/tiny")),
    "benchmark": (("metrics/benchmark.json",), ("--tasks", "none")),
}
"""Each tool that writes: where, and its arguments. tests/tools/test_fetch.py has the one that downloads."""

Call = Callable[..., None]


@pytest.fixture
def call(inside: Clone, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A tool's main function, in this process."""

    def called(tool: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        importlib.import_module(f"tools.{tool}").main()

    return called


@pytest.fixture
def occupied(call: Call) -> Call:
    def refused(tool: str, *arguments: str, why: str = "") -> None:
        with pytest.raises(InputError, match=rf"^\[occupied\] .*{why}"):
            call(tool, *arguments)

    return refused


def a_file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def a_link(path: Path) -> None:
    (path.parent / "precious").write_text("mine", encoding="utf-8")
    path.symlink_to("precious")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("mine", encoding="utf-8")


@pytest.mark.parametrize("tool", WRITING)
def test_what_lies_where_a_tool_writes_stays(occupied: Call, tool: str) -> None:
    places, arguments = WRITING[tool]
    for place in map(Path, places):
        for put in (a_file, a_link, a_folder):
            put(place)
            occupied(tool, *arguments, why=str(place))
            assert place.is_symlink() == (put is a_link)
            precious = place / "precious" if put is a_folder else place
            assert precious.read_text(encoding="utf-8") == "mine"
            shutil.rmtree(place) if put is a_folder else place.unlink()


def test_a_page_replaces_no_tracked_file_and_itself_until_it_is_edited(call: Call, occupied: Call) -> None:
    before = Path("params.yaml").read_bytes()
    occupied("inspect", "--count", "1", "--html", "params.yaml")
    assert Path("params.yaml").read_bytes() == before
    for _ in range(2):
        call("inspect", "--count", "1", "--html", "tokens.html")
    with Path("tokens.html").open("a", encoding="utf-8") as page:
        page.write("<!-- a note -->")
    occupied("inspect", "--count", "1", "--html", "tokens.html")


def test_a_tool_s_own_file_is_replaced_as_git_has_it_and_not_after_an_edit(inside: Clone, call: Call, occupied: Call) -> None:
    card = Path("reports/model_card.md")
    for _ in range(2):
        call("card")
    Path(".dvc/tmp/written.json").unlink()
    occupied("card", why="git add reports/model_card.md && git commit")
    inside.commit("the card")
    call("card")
    card.write_text("edited", encoding="utf-8")
    occupied("card")
    assert card.read_text(encoding="utf-8") == "edited"


def test_a_merged_model_with_a_foreign_or_changed_file_stays(call: Call, occupied: Call) -> None:
    """And a folder of results in which a file has the name of a merge's record."""
    for _ in range(2):
        call("merge", "--num-examples", "1")
    occupied("merge", "--out", "metrics")
    assert Path("metrics/evaluate.json").exists()
    for name in ("NOTES.md", "config.json"):
        with Path("models/merged", name).open("a", encoding="utf-8") as file:
            file.write("\n")
        occupied("merge", why=f"models/merged/{name} was not written by this tool, or has changed")
        assert Path("models/merged", name).exists()
        Path("models/merged/NOTES.md").unlink(missing_ok=True)


def test_a_recipe_is_written_through_a_link_and_keeps_the_mode(call: Call) -> None:
    Path("params.yaml").rename("mine.yaml")
    Path("mine.yaml").chmod(0o640)
    Path("params.yaml").symlink_to("mine.yaml")
    call("recipes", "use", "tiny-cpu")
    assert Path("params.yaml").readlink() == Path("mine.yaml")
    assert Path("mine.yaml").stat().st_mode & 0o777 == 0o640


def test_doctor_removes_no_partial_file_of_others(inside: Clone) -> None:
    for name in ("data/mine.partial", "data/x.1.partial", "reports/tracked.4194305.partial"):
        Path(name).write_text("mine", encoding="utf-8")
    inside.run("git", "add", "--force", "reports/tracked.4194305.partial")
    assert list(doctor.left_behind()) == []
