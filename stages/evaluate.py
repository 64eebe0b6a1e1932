"""Measure the adapter on the test set as `baseline` measured the base model, and compare.

reads   test conversations, adapter, the manifest of the base model, predictions and metrics of the baseline, the losses of the training
writes  predictions: one line per assistant turn; batches: which turns were answered together; report: the metrics and their differences;
        categories, scores: to be drawn; page: both models' answers to look at; made_by: the environment
params  base_model, chat, evaluate, hardware
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora import adapter, base_model, command, comparison, environment, hardware, launch, params, test_set
from qlora import report as report_page
from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation
from qlora.dvc_files import require_recorded
from qlora.params import Params
from qlora.provenance import note_environment
from qlora.ranks import is_first, leave, loss_of_others_named
from qlora.records import read_jsonl, read_points, write_csv, write_json, write_jsonl
from qlora.throughput import measured

PLOTTED = ("exact_match", "rouge_l")
"""Scores drawn by category."""


def evaluate(
    values: Params,
    *,
    test: Path,
    manifests: Path,
    adapter_folder: Path,
    base_predictions: Path,
    base_report: Path,
    train_loss: Path,
    eval_loss: Path,
    predictions: Path,
    batches: Path,
    report: Path,
    categories: Path,
    scores: Path,
    page: Path,
    throughput: Path,
    made_by: Path,
) -> None:
    require_recorded([test, adapter_folder, base_predictions, base_report, train_loss, eval_loss])
    conversations = [Conversation.from_record(record) for record in read_jsonl(test)]
    with loss_of_others_named():
        device = hardware.set_up(values.hardware, deterministic=False, processes=values.hardware.answering_processes)
        tuned = _measure(values, conversations, manifests, adapter_folder, throughput, device)
        first = is_first()
        leave()
    if not first:
        return
    base_answers = read_jsonl(base_predictions)
    differences = comparison.compare(base_answers, tuned.predictions)
    metrics = {**test_set.summarise(tuned.predictions, tuned.counts), "delta": comparison.record(differences)}
    write_jsonl(predictions, tuned.predictions)
    write_jsonl(batches, tuned.batches)
    write_json(report, metrics)
    write_csv(categories, ["category", *PLOTTED], [[name, *(row.get(score) for score in PLOTTED)] for name, row in metrics["by_category"].items()])
    note_environment(made_by, "evaluate", device)
    write_csv(scores, ["rouge_l", "answers"], test_set.histogram(tuned.predictions, "rouge_l"))
    report_page.write(
        page,
        title=f"{values.base_model.name}: base and tuned model",
        conversations=conversations,
        base=base_answers,
        tuned=tuned.predictions,
        differences=differences,
        base_metrics=json.loads(base_report.read_text(encoding="utf-8")),
        tuned_metrics=metrics,
        train_loss=read_points(train_loss),
        eval_loss=read_points(eval_loss),
    )


def _measure(
    values: Params, conversations: Sequence[Conversation], manifests: Path, adapter_folder: Path, throughput: Path, device: torch.device
) -> test_set.Measured:
    folder = base_model.verified_folder(values.base_model, manifests / f"{values.base_model.name}.json")
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    base = base_model.load_model(
        values.base_model,
        folder,
        device,
        progress=values.runtime.progress,
        spread=values.hardware.strategy == "fsdp2",
    )
    model = adapter.load_adapter(base, adapter_folder, values.base_model.name)
    with measured("evaluate", throughput, device) as work, hardware.out_of_memory_named(hardware.ANSWERING_SETTINGS, values):
        found = test_set.predict(model, template, conversations, values.evaluate, device, progress=values.runtime.progress)
        work.count(turns=len(found.predictions))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (
        "test",
        "manifests",
        "adapter-folder",
        "base-predictions",
        "base-report",
        "train-loss",
        "eval-loss",
        "predictions",
        "batches",
        "report",
        "categories",
        "scores",
        "page",
        "throughput",
        "made-by",
    ):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    launch.begin_processes("stages.evaluate", values, arguments.manifests, values.hardware.answering_processes)
    evaluate(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
