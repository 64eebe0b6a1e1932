from pathlib import Path
from typing import Any

from qlora import html_report
from qlora.conversation import Conversation, Message

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_what_a_model_wrote_stays_text_and_no_script_may_run(tmp_path: Path) -> None:
    conversation = Conversation("1", HOSTILE, [Message(role="user", content=HOSTILE), Message(role="assistant", content=HOSTILE)])
    prediction: dict[str, Any] = {"id": "1", "turn": 0, "category": HOSTILE, "answer": HOSTILE, "exact_match": 0.0}
    metrics = {"nll": 1.0, "exact_match": 0.5, "by_category": {HOSTILE: {"exact_match": 0.5, "turns": 1}}, "counts": {}}
    html_report.write(tmp_path / "report.html", [conversation], [prediction], [prediction], metrics, metrics)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6
    assert "default-src 'none'" in page


def test_every_number_is_shown_with_its_difference(tmp_path: Path) -> None:
    base, tuned = ({"nll": nll, "exact_match": exact, "by_category": {}, "counts": {}} for nll, exact in ((2.0, 0.1), (0.5, 0.9)))
    html_report.write(tmp_path / "report.html", [], [], [], base, tuned)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for number in ("2.0000", "0.5000", "-1.5000", "+0.8000"):
        assert number in page
