"""Every number that the evaluation gives a model, as a value of sums over answered turns; see qlora/scoring/metrics."""

import math
import statistics as stats
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora.core.conversation import Conversation
from qlora.core.errors import InputError
from qlora.core.text import nfc
from qlora.scoring.metrics import SCORES, Array, Direction
from qlora.scoring.metrics.ratio import ratio

Prediction = dict[str, Any]
"""One line of data/predictions/*.jsonl: one assistant turn of the test set, answered with one seed; once scored, with `statistics`."""


class Measure(NamedTuple):
    better: Direction
    statistics: Callable[[Prediction], Sequence[float]]
    """Numbers of one turn that may be summed."""
    value: Callable[[Array], Array]
    """(..., statistics) -> (...)"""
    of_answers: bool = True
    """Turns that were not answered (predict.turns: last) don't count."""

    def rows(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Those that count."""
        return [row for row in predictions if not self.of_answers or row["answer"] is not None]


def _perplexity(sums: Array) -> Array:
    """exp of the mean nats per supervised token; 1.0 is perfect. Beyond what a float holds it is the largest it holds."""
    return np.exp(np.minimum(ratio(sums), 700.0))


def _scored(name: str) -> Callable[[Prediction], Sequence[float]]:
    return lambda row: row["statistics"][name]


MEASURES: dict[str, Measure] = {
    # Nats per supervised token.
    "nll": Measure("lower", lambda row: (row["nll_sum"], row["tokens"]), ratio, of_answers=False),
    "perplexity": Measure("lower", lambda row: (row["nll_sum"], row["tokens"]), _perplexity, of_answers=False),
    # Of the answers' own text in UTF-8, without the stop token: comparable between tokenizers.
    "bits_per_byte": Measure("lower", lambda row: ((row["nll_sum"] - row["stop_nll"]) / math.log(2), row["bytes"]), ratio, of_answers=False),
    "stop_rate": Measure("higher", lambda row: (row["stopped"], 1), ratio),
    "answer_tokens": Measure("neither", lambda row: (row["answer_tokens"], 1), ratio),
    **{name: Measure(score.BETTER, _scored(name), score.value) for name, score in SCORES.items()},
}


def statistics(rows: Sequence[Prediction], measure: Measure) -> npt.NDArray[np.float64]:
    """(rows, statistics)"""
    return np.array([measure.statistics(row) for row in rows], dtype=np.float64)


def scored(predictions: Sequence[Prediction], conversations: Sequence[Conversation]) -> list[Prediction]:
    """The predictions with `statistics`, by score the numbers that it is a value of, for each turn that was answered.

    Answers and references are compared in Unicode normal form C.

    Raises:
        InputError: a prediction is of a turn that the test set does not have.
    """
    references: dict[tuple[str, int], str] = {}
    for conversation in conversations:
        for turn, place in enumerate(conversation.assistant_turns()):
            references[conversation.id, turn] = nfc(conversation.messages[place]["content"].strip())
    return [_with_statistics(row, references) for row in predictions]


def _with_statistics(row: Prediction, references: Mapping[tuple[str, int], str]) -> Prediction:
    if row["answer"] is None:
        return row
    reference = references.get((row["id"], row["turn"]))
    if reference is None:
        raise InputError(
            "predictions-foreign", f"turn {row['turn']} of conversation {row['id']} was answered, but the test set has no such turn: run `dvc repro`"
        )
    answer = nfc(row["answer"])
    return {**row, "statistics": {name: list(score.statistics(answer, reference)) for name, score in SCORES.items()}}


def values(predictions: Sequence[Prediction]) -> dict[str, float | None]:
    """Every measure of these scored turns together; None for one that is not defined for them."""
    found: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        rows = measure.rows(predictions)
        # A sum that does not depend on the order of the rows.
        sums = np.array([math.fsum(column) for column in statistics(rows, measure).T]) if rows else None
        found[name] = None if sums is None else defined(float(measure.value(sums)))
    return found


def defined(value: float) -> float | None:
    """The value, None for NaN: a score that is not defined must not look like a 0."""
    return None if math.isnan(value) else value


def summarise(predictions: Sequence[Prediction], counts: Mapping[str, int], sources: Mapping[str, str]) -> dict[str, Any]:
    """The measures of one model, overall, by category and by source; with several seeds the standard deviation of each between them.

    Args:
        sources: By the id of a conversation the file that it is from; those whose file is not told are left out of `by_source`.
    """
    by_category, by_source, by_seed = defaultdict(list), defaultdict(list), defaultdict(list)
    for prediction in predictions:
        by_category[prediction["category"]].append(prediction)
        if prediction["id"] in sources:
            by_source[sources[prediction["id"]]].append(prediction)
        by_seed[prediction["seed"]].append(prediction)
    (first, *_) = by_seed.values()
    groups = {"by_category": by_category} | ({"by_source": by_source} if by_source else {})
    summary = {
        **values(predictions),
        "counts": {**counts, "turns": len(first), "tokens": sum(prediction["tokens"] for prediction in first)},
        **{
            name: {group: {**values(rows), "turns": len(rows) // len(by_seed)} for group, rows in sorted(found.items())}
            for name, found in groups.items()
        },
    }
    if len(by_seed) > 1:
        each = [values(rows) for rows in by_seed.values()]
        summary["seed_deviation"] = {name: _deviation([row[name] for row in each]) for name in MEASURES}
    return summary


def _deviation(points: Sequence[float | None]) -> float | None:
    known = [point for point in points if point is not None]
    return stats.stdev(known) if len(known) == len(points) else None


def histogram(predictions: Sequence[Prediction], score: str, bins: int = 20) -> list[tuple[float, int]]:
    """How many answers have a score from 0 to 1 up to each edge and above the one before; the first edge is 0."""
    measure = MEASURES[score]
    points = measure.value(statistics(measure.rows(predictions), measure))
    counts = Counter(math.ceil(round(float(point) * bins, 9)) for point in points)
    return [(place / bins, counts[place]) for place in range(bins + 1)]
