"""Score what base and tuned model predicted, compare the two, and draw it. No model, no GPU, seconds.

reads   test conversations; predictions/{base,tuned}.jsonl and *_counts.json; train_report: the published step; metrics/{train,eval}_loss.csv
writes  metrics/evaluate.json: the headline; metrics/scores.csv, to be drawn; report: every score of both models, the differences with intervals,
        and scores by category, to be drawn; page: both models' answers to look at
params  evaluate, base_model.name
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.core.conversation import read_conversations
from qlora.core.dvc_lock import require_recorded
from qlora.core.errors import translate_errors
from qlora.core.files import neutral, read_jsonl, read_points, write_csv, write_json, write_metrics
from qlora.params import Params
from qlora.runtime import command
from qlora.runtime.provenance import record_environment
from qlora.scoring import bootstrap, measures
from qlora.scoring import report as report_page

SIDES = ("base", "tuned")
DRAWN = "exact_match"
"""The score that `dvc plots` draws by category."""


def evaluate(values: Params, *, test: Path, predictions: Path, train_report: Path, metrics: Path, report: Path, page: Path, notes: Path) -> None:
    """Write every number and picture of the two models.

    Raises:
        InputError: an input is not the output that dvc.lock records, or the predictions are not of the same turns of this test set.
    """
    curves = {name: metrics / f"{name}_loss.csv" for name in ("train", "eval")}
    inputs = [predictions / f"{side}{suffix}" for side in SIDES for suffix in (".jsonl", "_counts.json")]
    require_recorded([test, *inputs, train_report, *curves.values()])
    conversations = read_conversations(test)
    # What dvc.lock does not record yet, or records of somebody else's run, may be anything.
    with translate_errors("predictions-damaged", predictions, "or the training's report and losses are not as the stages write them", "`dvc repro`"):
        base, tuned = (measures.scored(read_jsonl(predictions / f"{side}.jsonl"), conversations) for side in SIDES)
        differences = bootstrap.compare(base, tuned, resamples=values.evaluate.resamples)
        sources = {conversation.id: conversation.source for conversation in conversations if conversation.source}
        counts = {side: _read(predictions / f"{side}_counts.json") for side in SIDES}
        summaries = {side: measures.summarise(rows, counts[side], sources) for side, rows in zip(SIDES, (base, tuned), strict=True)}
        train_loss, eval_loss = (read_points(path) for path in curves.values())
        published = dict(eval_loss).get(_read(train_report)["published_step"])
    write_metrics(metrics / "evaluate.json", headline(values.evaluate.headline, summaries["tuned"], published))
    drawn = [{"category": neutral(name), DRAWN: row[DRAWN]} for name, row in summaries["tuned"]["by_category"].items()]
    write_json(report, {**summaries, "difference": bootstrap.record(differences), "plot": drawn})
    write_csv(metrics / "scores.csv", ["rouge_l", "answers"], measures.histogram(tuned, "rouge_l"))
    report_page.write(
        page,
        title=f"{values.base_model.name}: base and tuned model",
        conversations=conversations,
        base=base,
        tuned=tuned,
        differences=differences,
        summaries=summaries,
        train_loss=train_loss,
        eval_loss=eval_loss,
    )
    record_environment(notes, "evaluate")


def headline(names: Sequence[str], tuned: Mapping[str, Any], eval_loss: float | None) -> dict[str, float | None]:
    """The metrics that `dvc exp show` shows, in the order of the names; eval_loss is left out where no step was validated as published."""
    found = {**tuned, "eval_loss": eval_loss}
    return {name: found[name] for name in names if name != "eval_loss" or eval_loss is not None}


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def main() -> None:
    values, paths = command.stage_inputs(evaluate, __doc__)
    evaluate(values, **paths)


if __name__ == "__main__":
    command.run(main)
