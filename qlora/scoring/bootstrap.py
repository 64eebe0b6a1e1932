"""Is one model better than another, or is it noise? A paired bootstrap over the conversations of a test set.

Method: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993; P. Koehn, Statistical Significance Tests for Machine Translation
Evaluation, 2004. Conversations are drawn, not turns: the turns of one conversation are not independent.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora.core.errors import InputError
from qlora.scoring.measures import MEASURES, Measure, Prediction, defined, statistics

SEED = 0
CHUNK = 5_000_000
"""Numbers drawn at once."""
FEWEST = 12
"""Conversations below which no verdict is given: of 5 the interval leaves out the truth in 9 of 100 experiments, from 12 on in 5 (simulated)."""
PER_TOKEN = ("nll", "perplexity")
"""Measures that two models share only when their tokens are the same."""

Verdict = Literal["better", "worse", "different", "no difference shown", "not defined"]
Floats = npt.NDArray[np.float64]


class Difference(NamedTuple):
    """A measure of two models on the same conversations; numbers are None where it is not defined for both."""

    before: float | None
    after: float | None
    delta: float | None
    """after - before"""
    low: float | None
    high: float | None
    """Of the 95 % interval of delta, over the resamples in which it is defined."""
    p_better: float | None
    """Share of those resamples in which `after` is better, ties counted half; None where neither direction is."""
    verdict: Verdict


def compare(before: Sequence[Prediction], after: Sequence[Prediction], *, resamples: int, names: Collection[str] = MEASURES) -> dict[str, Difference]:
    """Every measure of two models' predictions, with intervals.

    Measures per token are left out when the two took the same text for other tokens, by another tokenizer or template.

    Args:
        resamples: Of the bootstrap.
        names: Measures that are asked for.

    Raises:
        InputError: they are not of the same turns, or did not answer the same ones with the same seeds.
    """
    _require_aligned(before, after)
    clusters = _clusters(before)
    same_tokens = _tokens(before) == _tokens(after)
    known = {name: measure for name, measure in MEASURES.items() if name in names and (same_tokens or name not in PER_TOKEN)}
    # Of answers that only call tools no text is compared.
    chosen = {name: measure for name, measure in known.items() if measure.rows(before) and measure.rows(after)}
    sums = {name: (_sums(before, measure, clusters), _sums(after, measure, clusters)) for name, measure in chosen.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in chosen}
    for weights in _weights(len(clusters), resamples):
        for name, measure in chosen.items():
            drawn[name].append(measure.value(weights @ sums[name][1]) - measure.value(weights @ sums[name][0]))
    return {name: _difference(measure, *sums[name], np.concatenate(drawn[name])) for name, measure in chosen.items()}


def record(differences: Mapping[str, Difference]) -> dict[str, dict[str, float | None]]:
    """For reports: each difference with its interval and, where a direction is better, the share of resamples in which it is for the better."""
    return {
        name: {
            **{field: getattr(difference, field) for field in ("delta", "low", "high")},
            **({"p_better": difference.p_better} if MEASURES[name].better != "neither" else {}),
        }
        for name, difference in differences.items()
    }


def _require_aligned(before: Sequence[Prediction], after: Sequence[Prediction]) -> None:
    sides = [Counter((row["id"], row["turn"], row["seed"], row["answer"] is not None) for row in side) for side in (before, after)]
    alone = (sides[0] - sides[1]) + (sides[1] - sides[0])
    if not alone:
        return
    turns = [{key[:2] for key in side} for side in sides]
    if turns[0] != turns[1]:
        differ = sorted(turns[0] ^ turns[1])
        what = f"the predictions are not of the same turns: {len(differ)} are in one of them alone, such as {differ[:3]}"
    else:
        name, turn, seed, _ = min(alone)
        what = f"the same turns were not answered with the same seeds, such as turn {turn} of {name} with seed {seed}"
    raise InputError(
        "compare-unaligned",
        f"{what}. Both must come from the same test set and the same predict.num_examples, predict.turns and predict.generation_seeds.",
    )


def _tokens(rows: Sequence[Prediction]) -> dict[tuple[str, int], int]:
    return {(row["id"], row["turn"]): row["tokens"] for row in rows}


def _clusters(rows: Sequence[Prediction]) -> dict[str, int]:
    """Number of each conversation, in an order that both sides share."""
    return {name: place for place, name in enumerate(sorted({row["id"] for row in rows}))}


def _sums(rows: Sequence[Prediction], measure: Measure, clusters: dict[str, int]) -> Floats:
    """(conversations, statistics)"""
    rows = measure.rows(rows)
    found = statistics(rows, measure)
    sums = np.zeros((len(clusters), found.shape[1]))
    np.add.at(sums, [clusters[row["id"]] for row in rows], found)
    return sums


def _weights(count: int, resamples: int) -> Iterator[Floats]:
    """(some resamples, count): how often each conversation is drawn; `resamples` rows in all."""
    rng = np.random.default_rng(SEED)
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _difference(measure: Measure, before: Floats, after: Floats, drawn: Floats) -> Difference:
    values = defined(float(measure.value(before.sum(0)))), defined(float(measure.value(after.sum(0))))
    drawn = drawn[~np.isnan(drawn)]
    if values[0] is None or values[1] is None or not len(drawn):
        return Difference(*values, None, None, None, None, "not defined")
    low, high = (float(edge) for edge in np.quantile(drawn, (0.025, 0.975)))
    p_higher = float(np.mean(drawn > 0) + np.mean(drawn == 0) / 2)
    p_better = {"higher": p_higher, "lower": 1 - p_higher, "neither": None}[measure.better]
    verdict: Verdict = "no difference shown"
    if (low > 0 or high < 0) and len(before) >= FEWEST:
        verdict = "different" if p_better is None else "better" if p_better > 0.5 else "worse"
    return Difference(*values, values[1] - values[0], low, high, p_better, verdict)
