"""reports/report.html: the numbers with their intervals and every answer, in one file that opens from disk without a network.

What a model wrote is untrusted: it is escaped, and the page's policy allows no script but the one of page.js, by its hash.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora.comparison import FEWEST, Difference
from qlora.conversation import Conversation, Message
from qlora.measures import MEASURES, Prediction
from qlora.records import atomic_writers
from qlora.report import charts

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'"
EXAMPLES = 8
"""Most improved and most worsened answers that are shown."""
ROWS_SHOWN = 200
"""Rows of the table of all answers that are drawn at first; page.js draws as many at a time. Ten thousand at once take a browser a minute."""
RANKED_BY = "rouge_l"
"""The score by which answers are called improved; ties go by likelihood."""
UNITS = {"nll": "nats a token", "perplexity": "", "bits_per_byte": "bits a byte", "stop_rate": "share of answers", "answer_tokens": "mean"}

Curve = Sequence[tuple[float, float]]


class _Example(NamedTuple):
    """One assistant turn and both models' answers to it."""

    history: Sequence[Message]
    question: str
    reference: str
    base: Prediction
    tuned: Prediction

    @property
    def gain(self) -> tuple[float, float]:
        """Of the ranking score, then in nats a token."""
        return _ranking(self.tuned) - _ranking(self.base), (self.base["nll_sum"] - self.tuned["nll_sum"]) / self.tuned["tokens"]


def write(
    path: Path,
    *,
    title: str,
    conversations: Sequence[Conversation],
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    differences: Mapping[str, Difference],
    base_metrics: Mapping[str, Any],
    tuned_metrics: Mapping[str, Any],
    train_loss: Curve,
    eval_loss: Curve,
) -> None:
    """Write the page; `base` and `tuned` are predictions of the same turns in the same order, the first seed's answers are shown."""
    examples = _examples(conversations, base, tuned)
    ranked = sorted(examples, key=lambda example: example.gain, reverse=True)
    improved = [example for example in ranked if example.gain > (0, 0)][:EXAMPLES]
    worsened = [example for example in reversed(ranked) if example.gain < (0, 0)][:EXAMPLES]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n<meta name="viewport" content="width=device-width">\n',
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n",
        f'<p class="muted">{_coverage(len(examples), tuned_metrics["counts"])}</p>\n',
        '<nav><a href="#metrics">Metrics</a><a href="#charts">Charts</a><a href="#improved">Most improved</a>'
        '<a href="#worsened">Most worsened</a><a href="#answers">All answers</a></nav>\n',
        *_metrics_table(differences, len({row["id"] for row in tuned})),
        *_charts(examples, base_metrics, tuned_metrics, train_loss, eval_loss),
        *_section("improved", "Most improved", improved, "No answer improved."),
        *_section("worsened", "Most worsened", worsened, "No answer became worse."),
        *_all(examples),
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
    ]
    with atomic_writers([path]) as (file,):
        file.write("".join(parts).encode("utf-8", "replace"))


LEFT_OUT = {"too_long": "longer than the model's context", "control_token": "with the text of a control token", "not_chosen": "not chosen"}
"""Reasons for which a test conversation was not measured, as test_set counts them."""


def _coverage(answers: int, counts: Mapping[str, int]) -> str:
    """How much of the test set the numbers stand for."""
    left_out = {words: counts[reason] for reason, words in LEFT_OUT.items() if counts.get(reason)}
    measured = counts["conversations"] - sum(left_out.values())
    reasons = "; left out: " + ", ".join(f"{count:,} {words}" for words, count in left_out.items()) if left_out else ""
    return escape(f"{answers:,} answers to {measured:,} of {counts['conversations']:,} test conversations{reasons}.")


def _ranking(row: Prediction) -> float:
    """The score of one answer by which answers are ranked."""
    score = MEASURES[RANKED_BY]
    return float(score.value(np.array(score.statistics(row))))


def _examples(conversations: Sequence[Conversation], base: Sequence[Prediction], tuned: Sequence[Prediction]) -> list[_Example]:
    by_id = {conversation.id: conversation for conversation in conversations}
    examples = []
    for before, after in zip(base, tuned, strict=True):
        if after["answer"] is None or after["seed"] != tuned[0]["seed"]:
            continue
        messages = by_id[after["id"]].messages
        place = list(by_id[after["id"]].assistant_turns())[after["turn"]]
        examples.append(_Example(messages[: place - 1], messages[place - 1]["content"], messages[place]["content"], before, after))
    return examples


def _metrics_table(differences: Mapping[str, Difference], conversations: int) -> Iterator[str]:
    few = f"Fewer than {FEWEST} conversations are too few for a verdict." if conversations < FEWEST else ""
    yield (
        '<h2 id="metrics">Metrics</h2>\n<p>Difference: tuned minus base, with a 95 % interval from a paired bootstrap over conversations. '
        "Where the interval holds 0, no difference is shown; p(better) is the share of resamples in which the tuned model is better. "
        f"Each bar has a scale of its own. {few}</p>\n"
        '<div class="wide"><table>\n<tr><th>metric</th><th class="number">base</th><th class="number">tuned</th><th class="number">difference</th>'
        '<th class="number">95 % interval</th><th></th><th class="number">p(better)</th><th></th></tr>\n'
    )
    for name, found in differences.items():
        hints = [UNITS.get(name, ""), "lower is better" if MEASURES[name].better == "lower" else ""]
        numbers = (_short(found.before), _short(found.after), _short(found.delta, "+"), f"{_short(found.low, '+')} to {_short(found.high, '+')}")
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        bar = charts.interval(found.delta, found.low, found.high, found.verdict)
        sure = f'<td class="number">{"" if found.p_better is None else f"{found.p_better:.3f}"}</td>'
        chip = f'<span class="chip {found.verdict.split()[0]}">{found.verdict}</span>'
        yield f'<tr><td>{name} <span class="muted">{", ".join(filter(None, hints))}</span></td>{cells}<td>{bar}</td>{sure}<td>{chip}</td></tr>\n'
    yield "</table></div>\n"


def _short(number: float, sign: str = "") -> str:
    """As many digits as one reads."""
    digits = (
        ".2e" if abs(number) >= 1e9 else ",.0f" if abs(number) >= 10_000 else ".2f" if abs(number) >= 100 else ".3f" if abs(number) >= 0.1 else ".3g"
    )
    return format(number, sign + digits)


def _charts(examples: Sequence[_Example], base: Mapping[str, Any], tuned: Mapping[str, Any], train_loss: Curve, eval_loss: Curve) -> Iterator[str]:
    key = '<span class="key"><span><i class="base"></i>{}</span><span><i class="tuned"></i>{}</span></span>'
    models = key.format("base", "tuned")
    yield '<h2 id="charts">Charts</h2>\n<div class="charts">\n'
    losses = charts.lines({"base": train_loss, "tuned": eval_loss}, "step", "nats a token")
    yield _figure(f"Loss {key.format('training', 'validation')}", losses)
    for name in ("exact_match", RANKED_BY):
        pairs = {
            category: (base["by_category"][category][name], row[name])
            for category, row in tuned["by_category"].items()
            if name in row and category in base["by_category"]
        }
        yield _figure(f"{name} by category {models}", charts.bars(pairs, 1.0))
    before, after = [example.base for example in examples], [example.tuned for example in examples]
    yield _figure(f"{RANKED_BY} of each answer {models}", charts.histogram(list(map(_ranking, before)), list(map(_ranking, after)), RANKED_BY))
    lengths = [[row["answer_tokens"] for row in rows] for rows in (before, after)]
    yield _figure(f"Length of each answer {models}", charts.histogram(lengths[0], lengths[1], "tokens"))
    yield "</div>\n"


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>\n"


def _section(name: str, title: str, examples: Sequence[_Example], none: str) -> Iterator[str]:
    yield f'<h2 id="{name}">{title}</h2>\n'
    yield f'<p class="muted">By {RANKED_BY}, then by likelihood of the reference.</p>\n' if examples else f'<p class="muted">{none}</p>\n'
    for example in examples:
        gain, nats = example.gain
        kind = "better" if (gain, nats) > (0, 0) else "worse"
        history = "".join(f'<div class="said"><b>{escape(turn["role"])}</b> {escape(turn["content"])}</div>' for turn in example.history)
        before = f"<details><summary>what was said before</summary>{history}</details>" if history else ""
        sides = "".join(
            f'<div><h3>{side}</h3><div class="said">{escape(text)}</div></div>'
            for side, text in (("reference", example.reference), ("base", example.base["answer"]), ("tuned", example.tuned["answer"]))
        )
        yield (
            f'<article class="example"><header><span class="chip">{escape(example.tuned["category"])}</span>'
            f'<span class="{kind}">{RANKED_BY} {gain:+.3f}, {nats:+.3f} nats a token</span></header>{before}'
            f'<div class="asked said">{escape(example.question)}</div><div class="sides">{sides}</div></article>\n'
        )


def _all(examples: Sequence[_Example]) -> Iterator[str]:
    categories = "".join(f"<option>{escape(name)}</option>" for name in sorted({example.tuned["category"] for example in examples}))
    yield (
        '<h2 id="answers">All answers</h2>\n<div class="tools"><input type="search" id="search" placeholder="words in a question or an answer" '
        'aria-label="search"><select id="category" aria-label="category"><option value="">every category</option>'
        f'{categories}</select><select id="order" aria-label="order"><option value="">in the order of the test set</option>'
        '<option value="gain">most improved first</option><option value="loss">most worsened first</option></select>'
        '<span id="shown" class="muted"></span></div>\n<div class="wide">'
        f'<table id="all" data-shown="{ROWS_SHOWN}">\n<thead><tr><th>category</th><th>question</th>'
        f'<th>reference</th><th>base</th><th>tuned</th><th class="number">{RANKED_BY}</th></tr></thead>\n<tbody>\n'
    )
    for place, example in enumerate(examples):
        cells = (example.question, example.reference, example.base["answer"], example.tuned["answer"])
        said = "".join(f'<td><div class="said">{escape(text)}</div></td>' for text in cells)
        gain = example.gain
        kind = "better" if gain > (0, 0) else "worse" if gain < (0, 0) else ""
        late = ' class="hidden"' if place >= ROWS_SHOWN else ""
        yield (
            f'<tr{late} data-category="{escape(example.tuned["category"])}" data-gain="{gain[0] + gain[1] * 1e-6}" data-place="{place}">'
            f'<td>{escape(example.tuned["category"])}</td>{said}<td class="number {kind}">{gain[0]:+.3f}</td></tr>\n'
        )
    yield '</tbody></table></div>\n<p><button id="more" type="button" hidden>show more</button></p>\n'
