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
    counts = {"conversations": count + 3, "too_long": 2, "control_token": 0, "not_chosen": 1}
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
    assert "12 answers to 12 of 15 test conversations; left out: 2 longer than the model&#x27;s context, 1 not chosen." in page
    for part in ("Metrics", "Charts", "Most improved", "Most worsened", "All answers"):
        assert f">{part}</h2>" in page
    row = next(line for line in page.splitlines() if line.startswith("<tr><td>exact_match"))
    assert '<td class="number">0.0833</td><td class="number">0.917</td><td class="number">+0.833</td>' in row
    assert "better" in row
    assert page.count('<article class="example">') == report.EXAMPLES + 1
    assert page.count("<tr data-category") == 12
    assert page.count("<svg") == 5 + len(comparison.MEASURES)


def conversation_of_three(text: str) -> tuple[Conversation, list[dict[str, Any]], list[dict[str, Any]]]:
    """Three answered turns and what base and tuned model said, the last turn alone answered, each with two seeds."""
    messages = [Message(role="system", content=f"S {text}")]
    for turn in range(3):
        messages += [Message(role="user", content=f"Q{turn} {text}"), Message(role="assistant", content=f"R{turn} {text}")]
    conversation = Conversation("three", "c", messages)
    sides = []
    for side, nll in (("base", 3.0), ("tuned", 2.0)):
        rows = []
        for turn in range(3):
            for seed in (5, 6):
                said = test_set._scored(Answer(f"{side} seed {seed} {text}", stopped=True, tokens=3) if turn == 2 else None, f"R{turn} {text}")
                rows.append(
                    {"id": "three", "turn": turn, "category": "c", "seed": seed, "nll_sum": nll, "stop_nll": 0.1, "tokens": 4, "bytes": 9, **said}
                )
        sides.append(rows)
    return conversation, sides[0], sides[1]


def test_the_last_turn_of_several_stands_under_its_history_with_the_first_seeds_answers(tmp_path: Path) -> None:
    conversation, base, tuned = conversation_of_three("<b>&")
    (example,) = report._examples([conversation], base, tuned)
    assert (example.question, example.reference) == ("Q2 <b>&", "R2 <b>&")
    assert [message["content"] for message in example.history] == ["S <b>&", "Q0 <b>&", "R0 <b>&", "Q1 <b>&", "R1 <b>&"]
    assert (example.base["answer"], example.tuned["answer"]) == ("base seed 5 <b>&", "tuned seed 5 <b>&")
    assert example.gain[1] == pytest.approx((3.0 - 2.0) / 4)
    shown = "".join(report._section("improved", "t", [example], ""))
    assert "<b>&" not in shown.replace("<b>system</b>", "").replace("<b>user</b>", "").replace("<b>assistant</b>", "")
    order = [shown.index(text) for text in ("S &lt;b&gt;", "R1 &lt;b&gt;", "Q2 &lt;b&gt;", "R2 &lt;b&gt;", "base seed 5", "tuned seed 5")]
    assert order == sorted(order)
    row = "".join(report._all([example]))
    assert float(re.findall(r'data-gain="([^"]+)"', row)[0]) == pytest.approx(example.gain[0] + example.gain[1] * 1e-6)


def test_of_many_answers_the_first_are_shown_and_the_rest_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROWS_SHOWN", 5)
    page = write(tmp_path / "report.html", "plain")
    assert page.count('<tr class="hidden"') == 7
    if CHROMIUM:
        drawn, console = browse(tmp_path / "report.html", tmp_path / "profile")
        assert console == ""
        assert "12 of 12, the first 5 are shown" in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_the_most_improved_come_first_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "report.html", "plain")
    page = tmp_path / "sorted.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The page's policy allows no script but its own: what a person does with the mouse is added under another policy.
    act = "document.getElementById('order').value='loss';document.getElementById('order').dispatchEvent(new Event('change'))"
    text = re.sub(r"script-src &#x27;sha256-[^&]+&#x27;", "script-src &#x27;unsafe-inline&#x27;", text).replace(
        "</body>", f"<script>{act}</script></body>"
    )
    page.write_text(text, encoding="utf-8")
    drawn, console = browse(page, tmp_path / "profile")
    assert console == ""
    gains = [float(gain) for gain in re.findall(r'<tr[^>]* data-gain="([^"]+)"', drawn)]
    assert gains == sorted(gains)
    assert gains[0] < 0 < gains[-1]


def test_a_number_beyond_reading_is_short() -> None:
    assert report._short(1e304) == "1.00e+304"
    assert report._short(12_345.6, "+") == "+12,346"


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
