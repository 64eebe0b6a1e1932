"""The page: everything on it, nothing of a model's text taken for markup, and drawn by a real browser where one is installed."""

import base64
import hashlib
import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora.core.conversation import Conversation, Message
from qlora.scoring import bootstrap, measures, report
from qlora.scoring.bootstrap import Difference
from qlora.scoring.report import charts

HOSTILE = "</script><script>document.title='hostile'</script><img src=x onerror=\"document.title='hostile'\">\"'&\ud800"
CHROMIUM = shutil.which("chromium")


UNDEFINED = Difference(None, None, None, None, None, None, "not defined")


def prediction(conversation: Conversation, answer: str | None, nll: float, turn: int = 0, seed: int = 0) -> dict[str, Any]:
    said = {"answer": None} if answer is None else {"answer": answer, "answer_tokens": 3, "stopped": True}
    identity = {"id": conversation.id, "turn": turn, "category": conversation.category, "seed": seed}
    row = {**identity, "nll_sum": nll, "stop_nll": 0.1, "tokens": 4, "bytes": 9, **said}
    return measures.scored([row], [conversation])[0]


def render(path: Path, title: str, conversations: list[Conversation], base: list[dict[str, Any]], tuned: list[dict[str, Any]], **changed: Any) -> str:
    """The page of these predictions; `changed` replaces arguments of report.write."""
    counts = {"conversations": len(conversations) + 3, "too_long": 2, "control_token": 0, "not_chosen": 1}
    arguments: dict[str, Any] = {
        "differences": bootstrap.compare(base, tuned, resamples=100),
        "summaries": {"base": measures.summarise(base, counts, {}), "tuned": measures.summarise(tuned, counts, {})},
        "train_loss": [(step, 3 / step) for step in range(1, 50)],
        "eval_loss": [(25, 1.0), (49, 0.5)],
    }
    report.write(path, title=title, conversations=conversations, base=base, tuned=tuned, **arguments | changed)
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str = HOSTILE, count: int = 12, **changed: Any) -> str:
    conversations = [
        Conversation(
            str(place), text if place % 2 else "plain", [Message(role="user", content=f"{text} {place}"), Message(role="assistant", content="right")]
        )
        for place in range(count)
    ]
    base = [prediction(conversation, text if place else "right", 3.0) for place, conversation in enumerate(conversations)]
    tuned = [prediction(conversation, "right" if place else text, 2.0 + 2 * (place == 0)) for place, conversation in enumerate(conversations)]
    return render(path, f"{text} and tuned", conversations, base, tuned, **changed)


def cells(page: str, metric: str) -> list[str]:
    """The row of a metric, cell by cell."""
    (row,) = re.findall(rf'<tr id="metric-{metric}">(.*?)</tr>', page, re.DOTALL)
    return re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)


def test_what_a_model_wrote_stays_text_and_no_script_but_the_pages_own_may_run(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "default-src 'none'" in html.unescape(page)
    assert "innerHTML" not in page
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", page) == []


def test_every_number_and_every_part_is_there(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", "plain")
    assert "12 answers to 12 of 15 test conversations; left out: 2 longer than the model&#39;s context, 1 not chosen." in page
    for part in ("Metrics", "Charts", "Most improved", "Most worsened", "All answers"):
        assert f">{part}</h2>" in page
    row = cells(page, "exact_match")
    assert row[1:4] == ["0.0833", "0.917", "+0.833"]
    assert row[-1] == '<span class="chip better">better</span>'
    assert page.count('<article class="example">') == report.EXAMPLES + 1
    assert page.count("<tr data-category") == 12
    # Answers of one word have no BLEU, so its row has no bar.
    assert cells(page, "bleu")[4:7] == ["–", "–", "–"]
    assert page.count("<svg") == 5 + len(bootstrap.MEASURES) - 1


def test_the_policy_allows_the_pages_own_script_to_the_byte(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", "plain")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert f"script-src &#39;sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}&#39;;" in page


def test_a_number_that_is_not_defined_is_a_dash_everywhere(tmp_path: Path) -> None:
    values = {"exact_match": None, "rouge_l": None, "turns": 12}
    summary = {"counts": {"conversations": 12}, "by_category": {"plain": values}}
    page = write(
        tmp_path / "report.html",
        "plain",
        differences={
            "bleu": UNDEFINED,
            "chrf": UNDEFINED._replace(before=1.5),
            "length_ratio": Difference(1.0, 2.0, 1.0, 0.5, 1.5, None, "different"),
        },
        summaries={"base": summary, "tuned": summary},
        train_loss=[(1, float("nan")), (2, float("inf"))],
        eval_loss=[],
    )
    assert cells(page, "bleu") == ['bleu <span class="muted"></span>', "–", "–", "–", "–", "–", "–", '<span class="chip">not defined</span>']
    assert cells(page, "chrf")[1:7] == ["1.500", "–", "–", "–", "–", "–"]
    assert cells(page, "length_ratio")[1:5] == ["1.000", "2.000", "+1.000", "+0.500 to +1.500"]
    assert "<svg" in cells(page, "length_ratio")[5]
    assert cells(page, "length_ratio")[6] == "–"
    # Two bars in each of two charts.
    assert page.count(">–</text>") == 4
    assert "nothing was logged" in page
    for text in ("None", "nan", "inf<", "null"):
        assert text not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def conversation_of_three(text: str) -> tuple[Conversation, list[dict[str, Any]], list[dict[str, Any]]]:
    """Three answered turns and what base and tuned model said, the last turn alone answered, each with two seeds."""
    messages = [Message(role="system", content=f"S {text}")]
    for turn in range(3):
        messages += [Message(role="user", content=f"Q{turn} {text}"), Message(role="assistant", content=f"R{turn} {text}")]
    conversation = Conversation("three", "c", messages)
    base, tuned = (
        [prediction(conversation, f"{side} seed {seed} {text}" if turn == 2 else None, nll, turn, seed) for turn in range(3) for seed in (5, 6)]
        for side, nll in (("base", 3.0), ("tuned", 2.0))
    )
    return conversation, base, tuned


def test_the_last_turn_of_several_stands_under_its_history_with_the_first_seeds_answers(tmp_path: Path) -> None:
    conversation, base, tuned = conversation_of_three("<b>&")
    (example,) = report._examples([conversation], base, tuned)
    assert (example.question, example.reference) == ("Q2 <b>&", "R2 <b>&")
    assert [message["content"] for message in example.history] == ["S <b>&", "Q0 <b>&", "R0 <b>&", "Q1 <b>&", "R1 <b>&"]
    assert (example.base["answer"], example.tuned["answer"]) == ("base seed 5 <b>&", "tuned seed 5 <b>&")
    assert example.gain[1] == pytest.approx((3.0 - 2.0) / 4)
    page = render(tmp_path / "report.html", "t", [conversation], base, tuned)
    assert "<b>&" not in page.replace("<b>system</b>", "").replace("<b>user</b>", "").replace("<b>assistant</b>", "")
    assert "seed 6" not in page
    (shown,) = re.findall(r"<article.*?</article>", page, re.DOTALL)
    order = [shown.index(text) for text in ("S &lt;b&gt;", "R1 &lt;b&gt;", "Q2 &lt;b&gt;", "R2 &lt;b&gt;", "base seed 5", "tuned seed 5")]
    assert order == sorted(order)
    (gain,) = re.findall(r'data-gain="([^"]+)"', page)
    assert float(gain) == pytest.approx(example.gain[0] + example.gain[1] * 1e-6)


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
    text = re.sub(r"script-src &#39;sha256-[^&]+&#39;", "script-src &#39;unsafe-inline&#39;", text).replace(
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
    assert drawn.count("<svg") == 5 + len(bootstrap.MEASURES)


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
    assert "nan" not in charts.interval(Difference(1.0, 1.0, 0.0, 0.0, 0.0, 0.5, "no difference shown"))
    assert charts.interval(UNDEFINED) == "–"


def test_a_bar_of_a_score_that_is_not_defined_is_a_dash_and_no_bar() -> None:
    drawn = charts.bars({"a": (None, 0.5), "b": (0.0, None)}, 1.0)
    assert re.findall(r">([^<]+)</text>", drawn) == ["–", "0.5", "0", "–"]
    assert drawn.count("<rect") == 2


def test_points_of_a_curve_that_are_not_finite_are_left_out() -> None:
    drawn = charts.lines({"base": [(1, 2.0), (2, float("nan")), (3, 1.0)]}, "x", "y")
    assert drawn.count("<circle") == 2
    assert "nan" not in drawn


def test_no_name_from_the_data_becomes_markup_in_a_chart() -> None:
    hostile = "<script>\"'&"
    for drawn in (
        charts.bars({hostile: (0.1, None)}, 1.0),
        charts.lines({"base": [(1, 1.0)]}, hostile, hostile),
        charts.histogram([1.0], [1.0], hostile),
    ):
        assert "<script" not in drawn
        assert "&lt;script&gt;" in drawn
