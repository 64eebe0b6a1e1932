"""reports/report.html: the numbers with their intervals and every answer, in one file that opens from disk without a network.

page.html.jinja is its text, page.css its looks, page.js its one script, charts its pictures. What a model wrote is untrusted: Jinja escapes
every value, and the page's policy allows no script but that of page.js, by its hash.
"""

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from qlora.core.conversation import Conversation, Message
from qlora.core.files import atomic_writers
from qlora.scoring.bootstrap import FEWEST, Difference
from qlora.scoring.measures import MEASURES, Prediction
from qlora.scoring.report import charts

FOLDER = Path(__file__).parent
TEMPLATE = "page.html.jinja"
STYLE = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "page.js").read_text(encoding="utf-8")
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'"
EXAMPLES = 8
"""Most improved and most worsened answers that are shown."""
ROWS_SHOWN = 200
"""Rows of the table of all answers that are drawn at first; page.js draws as many at a time. Ten thousand at once take a browser a minute."""
RANKED_BY = "rouge_l"
"""The score by which answers are called improved; ties go by likelihood."""
UNITS = {"nll": "nats a token", "bits_per_byte": "bits a byte", "stop_rate": "share of answers", "answer_tokens": "mean"}
LEFT_OUT = {
    "too_long": "longer than the model's context",
    "control_token": "with the text of a control token",
    "not_rendered": "that the chat template can't show",
    "inseparable": "whose answer shares a token with its prompt",
    "not_chosen": "not chosen",
}
"""Reasons for which a test conversation was not measured, as prediction.test_set counts them."""

Curve = Sequence[tuple[float, float]]


class _Gain(NamedTuple):
    """How much better the tuned model's answer is; compared in this order."""

    score: float
    """Of RANKED_BY."""
    nats: float
    """A token of the reference."""

    @property
    def key(self) -> float:
        """Sorts as the pair does, for page.js."""
        return self.score + self.nats * 1e-6


class _Example(NamedTuple):
    """One assistant turn and both models' answers to it."""

    history: Sequence[Message]
    question: str
    reference: str
    base: Prediction
    tuned: Prediction
    gain: _Gain

    @property
    def category(self) -> str:
        return str(self.tuned["category"])

    @property
    def kind(self) -> str:
        """Its class in page.css."""
        return "better" if self.gain > (0, 0) else "worse" if self.gain < (0, 0) else ""


class _Figure(NamedTuple):
    """A chart and what its two colours stand for."""

    caption: str
    chart: Markup
    grey: str = "base"
    blue: str = "tuned"


def write(
    path: Path,
    *,
    title: str,
    conversations: Sequence[Conversation],
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    differences: Mapping[str, Difference],
    summaries: Mapping[str, Mapping[str, Any]],
    train_loss: Curve,
    eval_loss: Curve,
) -> None:
    """Write the page.

    Args:
        base: Scored predictions of the same turns in the same order as `tuned`; the first seed's answers are shown.
        summaries: Of "base" and "tuned", as measures.summarise makes them.
        train_loss: (step, nats a token)
        eval_loss: (step, nats a token)
    """
    examples = _examples(conversations, base, tuned)
    text = _template().render(
        policy=POLICY,
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        title=title,
        coverage=_coverage(len(examples), summaries["tuned"]["counts"]),
        fewest=FEWEST,
        too_few=len({row["id"] for row in tuned}) < FEWEST,
        differences=differences,
        hints={name: _hint(name) for name in differences},
        figures=_figures(examples, summaries["base"], summaries["tuned"], train_loss, eval_loss),
        ranked_by=RANKED_BY,
        sections=_sections(examples),
        categories=sorted({example.category for example in examples}),
        rows_shown=ROWS_SHOWN,
        examples=examples,
    )
    with atomic_writers([path]) as (file,):
        # A lone surrogate becomes a question mark.
        file.write(text.encode("utf-8", "replace"))


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(short=_short, interval=charts.interval)
    return environment.get_template(TEMPLATE)


def _sections(examples: Sequence[_Example]) -> list[tuple[str, str, list[_Example], str]]:
    """(id, title, examples, what to say without any) of the most improved and most worsened answers."""
    ranked = sorted(examples, key=lambda example: example.gain, reverse=True)
    improved = [example for example in ranked if example.gain > (0, 0)][:EXAMPLES]
    worsened = [example for example in reversed(ranked) if example.gain < (0, 0)][:EXAMPLES]
    return [("improved", "Most improved", improved, "No answer improved."), ("worsened", "Most worsened", worsened, "No answer became worse.")]


def _coverage(answers: int, counts: Mapping[str, int]) -> str:
    """How much of the test set the numbers stand for."""
    left_out = {words: counts[reason] for reason, words in LEFT_OUT.items() if counts.get(reason)}
    measured = counts["conversations"] - sum(left_out.values())
    reasons = "; left out: " + ", ".join(f"{count:,} {words}" for words, count in left_out.items()) if left_out else ""
    return f"{answers:,} answers to {measured:,} of {counts['conversations']:,} test conversations{reasons}."


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
        gain = _Gain(_ranking(after) - _ranking(before), (before["nll_sum"] - after["nll_sum"]) / after["tokens"])
        examples.append(_Example(messages[: place - 1], messages[place - 1]["content"], messages[place]["content"], before, after, gain))
    return examples


def _hint(name: str) -> str:
    """The unit of a measure, and its direction where that is not the usual one."""
    return ", ".join(filter(None, [UNITS.get(name), "lower is better" if MEASURES[name].better == "lower" else None]))


def _short(number: float | None, sign: str = "") -> str:
    """As many digits as one reads; a dash for None."""
    if number is None:
        return "–"
    digits = (
        ".2e" if abs(number) >= 1e9 else ",.0f" if abs(number) >= 10_000 else ".2f" if abs(number) >= 100 else ".3f" if abs(number) >= 0.1 else ".3g"
    )
    return format(number, sign + digits)


def _figures(examples: Sequence[_Example], base: Mapping[str, Any], tuned: Mapping[str, Any], train_loss: Curve, eval_loss: Curve) -> list[_Figure]:
    losses = charts.lines({"base": train_loss, "tuned": eval_loss}, "step", "nats a token")
    figures = [_Figure("Loss", losses, grey="training", blue="validation")]
    for name, group in itertools.product(("exact_match", RANKED_BY), ("category", "source")):
        before_by, after_by = (side.get(f"by_{group}", {}) for side in (base, tuned))
        pairs = {one: (before_by[one][name], after_by[one][name]) for one in sorted(after_by.keys() & before_by.keys())}
        if pairs:
            figures.append(_Figure(f"{name} by {group}", charts.bars(pairs, 1.0)))
    before, after = [example.base for example in examples], [example.tuned for example in examples]
    scores = charts.histogram([_ranking(row) for row in before], [_ranking(row) for row in after], RANKED_BY)
    figures.append(_Figure(f"{RANKED_BY} of each answer", scores))
    lengths = charts.histogram([row["answer_tokens"] for row in before], [row["answer_tokens"] for row in after], "tokens")
    figures.append(_Figure("Length of each answer", lengths))
    return figures
