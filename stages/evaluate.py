"""Score what base and tuned model predicted, compare the two, and draw it. No model, no GPU, seconds.

reads   test conversations; predictions/{base,tuned}.jsonl and *_counts.json; train_report: the published step; metrics/{train,eval}_loss.csv
writes  metrics/evaluate.json: the headline; metrics/scores.csv, to be drawn; report: every score of both models, the differences with intervals,
        and scores by category, to be drawn; page: both models' answers to look at
params  evaluate, base_model.name
"""

import json
import logging
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
from qlora.scoring.table import table

SIDES = ("base", "tuned")
DRAWN = "exact_match"
"""The score that `dvc plots` draws by category."""
FEW_CONVERSATIONS, FEW_STOPS, RISEN = 30, 0.5, 1.05
"""From where a warning is shown: conversations of the test set, stop_rate, the last validation loss over the lowest."""
logger = logging.getLogger("qlora.evaluate")


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
    _tell(values, differences, published, page)
    _warn(summaries["tuned"], eval_loss, len(conversations))


def _tell(values: Params, differences: Mapping[str, bootstrap.Difference], eval_loss: float | None, page: Path) -> None:
    """The headline of both models, and where to look next."""
    shown: dict[str, bootstrap.Difference] = {name: differences[name] for name in values.evaluate.headline if name in differences}
    validation = "" if eval_loss is None else f"validation loss {eval_loss:.4f}; "
    command.say(f"{table(shown, *SIDES)}\n{validation}all answers side by side: {page} (in a browser); talk to it: python -m tools.chat")


def _warn(tuned: Mapping[str, Any], eval_loss: Sequence[tuple[float, float]], conversations: int) -> None:
    """What a person should know before they trust these numbers."""
    if conversations < FEW_CONVERSATIONS:
        logger.warning("the test set has %d conversations: numbers of so few decide little", conversations)
    stop_rate = tuned["stop_rate"]
    if stop_rate is not None and stop_rate < FEW_STOPS:
        logger.warning(
            "%s of the answers end by themselves, the others were cut off: raise predict.max_new_tokens, or train longer", f"{stop_rate:.0%}"
        )
    lowest_step, lowest = min(eval_loss, key=lambda point: point[1], default=(0, 0.0))
    if eval_loss and eval_loss[-1][1] > RISEN * lowest:
        logger.warning(
            "the validation loss rose from %.4f at step %d to %.4f: train.keep: best publishes the lowest, or train fewer epochs",
            lowest,
            lowest_step,
            eval_loss[-1][1],
        )


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
