"""What a person sees before an expensive training."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.core.files import write_jsonl
from tools import inspect


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def line(identifier: str, question: str, answer: str) -> dict[str, object]:
        return {
            "id": identifier,
            "category": "sum",
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }

    write_jsonl(tmp_path / "train.jsonl", [line("a", "2+2?", "4"), line("b", "\x1b[31m\u6771?", "\u4eac <b>"), line("c", "2+2? " * 300, "4")])
    write_jsonl(tmp_path / "validation.jsonl", [line("d", "3+3?", "6")])
    write_jsonl(tmp_path / "test.jsonl", [line("e", "4+4?", "8")])
    monkeypatch.setattr(inspect, "PREPARED", tmp_path)
    return tmp_path


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["inspect", *arguments])
    inspect.main()
    return capsys.readouterr().out


@pytest.mark.usefixtures("prepared")
def test_what_is_supervised_is_marked_and_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(monkeypatch, capsys, "--count", "1")
    assert re.match(r"train a \(sum\): \d+ tokens, 2 supervised\n", output)
    assert output.rstrip().endswith("2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\u27e64<|eot_id|>\u27e7")


@pytest.mark.usefixtures("prepared")
def test_a_conversation_is_found_by_its_id_in_any_split(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(monkeypatch, capsys, "--id", "e").startswith("test e (sum)")
    monkeypatch.setattr(sys, "argv", ["inspect", "--id", "z"])
    with pytest.raises(inspect.InputError, match="no conversation has the id 'z'"):
        inspect.main()


@pytest.mark.usefixtures("prepared")
def test_what_training_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "longer than sequence.max_length" in shown(monkeypatch, capsys, "--id", "c").splitlines()[0]


@pytest.mark.usefixtures("prepared")
def test_no_text_steers_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(monkeypatch, capsys, "--id", "b")
    assert "\x1b" not in output
    assert "\\x1b[31m\u6771?" in output


def test_colours_mark_supervised_and_control_tokens() -> None:
    pieces = [inspect.Piece(1, "a", False, False), inspect.Piece(2, "b", True, False), inspect.Piece(3, "<end>", True, True)]
    text = inspect.terminal(inspect.View("title", pieces), colours=True)
    assert text == "title\na\x1b[32mb\x1b[0m\x1b[32m\x1b[7m<end>\x1b[0m\n"


@pytest.mark.usefixtures("prepared")
def test_the_page_escapes_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown(monkeypatch, capsys, "--count", "3", "--html", str(tmp_path / "page.html"))
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>" not in written
    assert "&lt;" in written
    assert written.count("<h2>") == 3


def test_the_page_shows_each_token_as_it_is_and_what_it_is() -> None:
    pieces = [
        inspect.Piece(1, "\n <a href='x'>", False, False),
        inspect.Piece(2, '&amp;"', True, False),
        inspect.Piece(3, "<end>", True, True),
        inspect.Piece(4, "\n", False, True),
    ]
    page = inspect.page([inspect.View("<i> & title", pieces), inspect.View("left out", [])])
    assert "<h2>&lt;i&gt; &amp; title</h2>" in page
    assert re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL) == [
        '<span title="1" class="token">\n &lt;a href=&#39;x&#39;&gt;</span>'
        '<span title="2" class="token supervised">&amp;amp;&#34;</span>'
        '<span title="3" class="token supervised control">&lt;end&gt;</span>'
        '<span title="4" class="token control">\n</span>',
        "",
    ]
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_nothing_prepared_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "PREPARED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect"])
    with pytest.raises(inspect.InputError, match=r"\[inspect-nothing\] .*train.jsonl does not exist: run `dvc repro prepare` first"):
        inspect.main()


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("policy", "first"), [("truncate", "17 tokens, cut from 18, 1 supervised"), ("split", "piece 1 of 2: ")])
def test_what_is_shown_is_what_is_supervised_when_something_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str, first: str
) -> None:
    read = inspect.params.load

    def shorter(path: Path) -> Any:
        values = read(path)
        return values.model_copy(update={"sequence": values.sequence.model_copy(update={"max_length": 17, "on_too_long": policy})})

    monkeypatch.setattr(inspect.params, "load", shorter)
    assert first in shown(monkeypatch, capsys, "--id", "a").splitlines()[0]
