"""The page: everything on it, nothing of a model's text taken for markup, and drawn by a real browser where one is installed."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora import comparison, report, test_set
from qlora.conversation import Conversation, Message
from qlora.generation import Answer
from qlora.report import charts

HOSTILE = "</script><script>document.title='hostile'</script><img src=x onerror=\"document.title='hostile'\">\"'&\ud800"
CHROMIUM = shutil.which("chromium")


def prediction(conversation: Conversation, answer: str, nll: float) -> dict[str, Any]:
    said = test_set._scored(Answer(answer, stopped=True, tokens=3), conversation.messages[-1]["content"])
    identity = {"id": conversation.id, "turn": 0, "category": conversation.category, "seed": 0}
    return {**identity, "nll_sum": nll, "stop_nll": 0.1, "tokens": 4, "bytes": 9, **said}


def write(path: Path, text: str = HOSTILE, count: int = 12) -> str:
    conversations = [
        Conversation(
            str(place), text if place % 2 else "plain", [Message(role="user", content=f"{text} {place}"), Message(role="assistant", content="right")]
        )
        for place in range(count)
    ]
    base = [prediction(conversation, text if place else "right", 3.0) for place, conversation in enumerate(conversations)]
    tuned = [prediction(conversation, "right" if place else text, 2.0 + 2 * (place == 0)) for place, conversation in enumerate(conversations)]
    counts = {"conversations": count}
    report.write(
        path,
        title=f"{text} and tuned",
        conversations=conversations,
        base=base,
        tuned=tuned,
        differences=comparison.compare(base, tuned, resamples=100),
        base_metrics=test_set.summarise(base, counts),
        tuned_metrics=test_set.summarise(tuned, counts),
        train_loss=[(step, 3 / step) for step in range(1, 50)],
        eval_loss=[(25, 1.0), (49, 0.5)],
    )
    return path.read_text(encoding="utf-8")


def test_what_a_model_wrote_stays_text_and_no_script_but_the_pages_own_may_run(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert "innerHTML" not in page
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", page) == []


def test_every_number_and_every_part_is_there(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", "plain")
    for part in ("Metrics", "Charts", "Most improved", "Most worsened", "All answers"):
        assert f">{part}</h2>" in page
    row = next(line for line in page.splitlines() if line.startswith("<tr><td>exact_match"))
    assert '<td class="number">0.0833</td><td class="number">0.917</td><td class="number">+0.833</td>' in row
    assert "better" in row
    assert page.count('<article class="example">') == report.EXAMPLES + 1
    assert page.count("<tr data-category") == 12
    assert page.count("<svg") == 5 + len(comparison.MEASURES)


def browse(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The page's elements once it was drawn, and what the browser logged."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--enable-logging=stderr", *options]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_a_browser_draws_it_without_an_error_and_hostile_answers_stay_text(tmp_path: Path) -> None:
    write(tmp_path / "report.html")
    drawn, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == ""
    assert "12 of 12" in drawn, "the page's own script did not run"
    assert "<img" not in drawn
    assert "<title>hostile" not in drawn
    assert drawn.count("<svg") == 5 + len(comparison.MEASURES)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_a_browser_refuses_a_script_that_is_not_the_pages_own(tmp_path: Path) -> None:
    """The policy itself, should a text ever come through unescaped."""
    page = write(tmp_path / "report.html", "plain").replace(
        "<h2", "<script>document.title='hostile'</script><img src=x onerror=\"document.title='hostile'\"><h2", 1
    )
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    drawn, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert "<title>hostile" not in drawn
    assert "Content Security Policy" in console


def test_charts_of_odd_numbers_are_drawn() -> None:
    assert "nothing was logged" in charts.lines({"base": [], "tuned": []}, "x", "y")
    assert "<path" in charts.lines({"base": [(5, 0.0)]}, "x", "y")
    assert "nothing was answered" in charts.histogram([], [], "x")
    assert charts.histogram([0.0, 0.0], [0.0], "x").count("<rect") == 40
    assert "a…" in charts.bars({"a" * 40: (0.0, 1.0)}, 1.0)
    assert "<title>&lt;b&gt;</title>" in charts.bars({"<b>": (0.0, 1.0)}, 1.0)
    assert "nan" not in charts.interval(0.0, 0.0, 0.0, "no difference shown")
