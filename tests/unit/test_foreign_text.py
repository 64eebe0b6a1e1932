"""Text of others is data wherever it is shown: it controls no terminal, marks up no page, is no formula of a spreadsheet and no command."""

import csv
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qlora.core.files import write_csv
from qlora.core.text import in_markdown, in_shell, visible
from qlora.runtime import command
from tools import doctor
from tools.inspect import View, terminal

HOSTILE = [
    "apache-2.0\n# A heading\n",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![](https://example.org/x.png) [a](javascript:alert(1))",
    "a | b | c",
    "`code` ``and`` more",
    "*bold* _it_ **x** ~~gone~~ \\* &lt;b&gt;",
    "---\nlicense: other\n---",
    "```\nfence",
    "\x1b[2J\x1b]0;title\x07 \x9b31m \u202e \r over",
    "=HYPERLINK(1)",
    "\n=1+1",
    "\ufeff=1",
    "\uff1d1+1",
    "|calc",
    "\t@SUM(1)",
    "$(touch hit) `touch hit`; touch hit\ntouch hit\n",
    "'; touch hit; '",
    "$'\\x41' \\",
    "-rf *",
    "\udcff name",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(), st.tuples(st.sampled_from(HOSTILE), st.text()).map("".join))


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Tags:
    tags = Tags()
    # What the Hub allows besides CommonMark; its HTML is shown, so that what gets through is seen.
    tags.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return tags


@example("__0__")
@given(TEXTS)
def test_a_page_shows_it_and_has_no_mark_up_of_its(text: str) -> None:
    shown = in_markdown(text)
    assert rendered(f"licence {shown}, and so on").tags == ["p"]
    assert rendered(f"| a | b |\n|---|---|\n| {shown} | 1 |\n").tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert rendered(f"x {shown}").text.strip() == " ".join(["x", *visible(text).split()])


@given(TEXTS)
def test_a_spreadsheet_takes_it_for_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    write_csv(path, ["category", "answers"], [[text.encode("utf-8", "replace").decode(), 1]])
    with path.open(encoding="utf-8", newline="") as file:
        _, (cell, number) = csv.reader(file)
    assert number == "1"
    assert not cell.startswith(("=", "+", "-", "@", "|", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\ufeff", " =", "\u3000="))
    assert cell.isprintable() or cell == ""
    assert "<" not in cell
    # A page of `dvc plots` holds them in a script.
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def names(found: list[doctor.Finding]) -> set[str]:
    """The words of the commands, as bash reads them, where nothing but words is run."""
    script = "\n".join(f"set -- {finding.fix.partition('   #')[0].removeprefix('rm -rf ')}; printf '%s\\0' \"$@\"" for finding in found)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}


@given(TEXTS)
def test_a_command_is_one_line(text: str) -> None:
    assert in_shell(text).isprintable()


def test_a_shell_takes_it_for_one_word() -> None:
    words = " ".join(map(in_shell, ["", *HOSTILE]))
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(text) for text in ["", *HOSTILE]]


@pytest.mark.parametrize("text", HOSTILE)
def test_doctor_s_commands_name_the_files_and_nothing_else(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_running", lambda *_: False)
    name = text.replace("/", "")
    places = [Path("data") / f"{name}.4194305.partial", Path("reports") / name / "x.4194305.partial"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("half", encoding="utf-8")
    assert names(list(doctor.left_behind())) == {str(place) for place in places}
    assert not Path("hit").exists()


@given(TEXTS)
def test_a_terminal_shows_it_and_is_not_controlled(text: str) -> None:
    title = f"train 0 ({text})"
    for printed in (terminal(View(title, []), colours=False), terminal(View(title, []), colours=True)):
        assert all(one.isprintable() or one in "\n\t" for one in printed)


def test_what_a_tool_prints_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    command.say("a\x1b[2J\u202eb\n\tc")
    assert capsys.readouterr().out == "a\\x1b[2J\\x202eb\n\tc\n"


def test_every_tool_prints_through_it() -> None:
    """But for the chat, which shows each text by itself, the coloured tokens of inspect, and two lines of numbers on the other stream."""
    folder = Path(__file__).parents[2] / "tools"
    assert {path.name for path in folder.glob("*.py") if " print(" in path.read_text(encoding="utf-8")} == {
        "chat.py",
        "inspect.py",
        "compare.py",
        "merge.py",
    }
