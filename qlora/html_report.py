"""reports/report.html: the numbers and every answer, in one file that opens from disk.

What a model wrote is untrusted: it is escaped, and the page's policy allows no script at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora.conversation import Conversation
from qlora.records import atomic_writers

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.right { border-left: 4px solid #2a9d5c; } td.wrong { border-left: 4px solid #c8553d; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
DIRECTION = {"nll": "lower is better", "perplexity": "lower is better"}


def write(
    path: Path,
    conversations: Sequence[Conversation],
    base: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]],
    base_metrics: Mapping[str, Any],
    tuned_metrics: Mapping[str, Any],
) -> None:
    """Write the page; `base` and `tuned` are predictions of the same turns in the same order."""
    title = "Base and tuned model on the test set"
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="viewport" content="width=device-width">\n',
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<body>\n<h1>{title}</h1>\n",
        *_metrics_table(base_metrics, tuned_metrics),
        *_category_table(base_metrics, tuned_metrics),
        *_answers_table(conversations, base, tuned),
    ]
    with atomic_writers([path]) as (file,):
        file.write("".join(parts).encode())


def _row(cells: Sequence[str], kinds: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for cell, kind in zip(cells, kinds, strict=True)) + "</tr>\n"


def _metrics_table(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[str]:
    kinds = ("", "number", "number", "number", "")
    yield "<h2>Metrics</h2>\n<table>\n" + _row(("metric", "base", "tuned", "difference", ""), kinds, "th")
    for name, value in _numbers(tuned):
        hint = DIRECTION.get(name, "higher is better")
        yield _row((name, f"{base[name]:.4f}", f"{value:.4f}", f"{value - base[name]:+.4f}", hint), kinds)
    yield "</table>\n"


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in sorted(metrics.items()) if isinstance(value, float))


def _category_table(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[str]:
    kinds = ("", "number", "number", "number")
    yield "<h2>Exact match by category</h2>\n<table>\n" + _row(("category", "turns", "base", "tuned"), kinds, "th")
    for category, row in tuned["by_category"].items():
        before = base["by_category"][category]["exact_match"]
        yield _row((category, str(row["turns"]), f"{before:.3f}", f"{row['exact_match']:.3f}"), kinds)
    yield "</table>\n"


def _answers_table(conversations: Sequence[Conversation], base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    by_id = {conversation.id: conversation for conversation in conversations}
    yield "<h2>Answers</h2>\n<table>\n" + _row(("category", "question", "reference", "base", "tuned"), [""] * 5, "th")
    for before, after in zip(base, tuned, strict=True):
        messages = by_id[after["id"]].messages
        place = list(by_id[after["id"]].assistant_turns())[after["turn"]]
        cells = (after["category"], messages[place - 1]["content"], messages[place]["content"], before["answer"], after["answer"])
        yield _row(cells, ("", "", "", _mark(before), _mark(after)))
    yield "</table>\n"


def _mark(prediction: Mapping[str, Any]) -> str:
    return "right" if prediction["exact_match"] else "wrong"
