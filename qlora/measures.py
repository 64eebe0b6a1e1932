"""Every number that the evaluation gives a model, as a value of sums over answered turns; see qlora/scoring."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora.scoring import SCORES, Array, Direction
from qlora.scoring.ratio import ratio

Prediction = dict[str, Any]
"""One line of data/predictions/*.jsonl: one assistant turn of the test set, answered with one seed."""


class Measure(NamedTuple):
    better: Direction
    statistics: Callable[[Prediction], Sequence[float]]
    """Numbers of one turn that may be summed."""
    value: Callable[[Array], Array]
    """(..., statistics) -> (...)"""
    of_answers: bool = True
    """Turns that were not answered (evaluate.turns: last) don't count."""

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


def values(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Every measure of these turns together; one that no turn has an answer for is left out."""
    found = {}
    for name, measure in MEASURES.items():
        rows = measure.rows(predictions)
        if rows:
            # A sum that does not depend on the order of the rows.
            sums = np.array([math.fsum(column) for column in statistics(rows, measure).T])
            found[name] = float(measure.value(sums))
    return found
