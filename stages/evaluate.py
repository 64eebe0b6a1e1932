"""Measure the adapter on the test set as `baseline` measured the base model, and compare.

reads   test conversations, adapter, the manifest of the base model, predictions and metrics of the baseline
writes  predictions: one line per assistant turn; report: the metrics and their differences; page: both models' answers to look at
params  base_model, chat, evaluate, hardware
"""

import argparse
import json
from pathlib import Path

from qlora import adapter, base_model, command, environment, hardware, html_report, params, test_set
from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation
from qlora.params import Params
from qlora.records import read_jsonl, write_json, write_jsonl
from qlora.throughput import measured


def evaluate(
    values: Params,
    *,
    test: Path,
    manifests: Path,
    adapter_folder: Path,
    base_predictions: Path,
    base_report: Path,
    predictions: Path,
    report: Path,
    page: Path,
    throughput: Path,
) -> None:
    device = hardware.set_up(values.hardware, deterministic=False)
    folder = base_model.verified_folder(values.base_model, manifests / f"{values.base_model.name}.json")
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    conversations = [Conversation.from_record(record) for record in read_jsonl(test)]
    base = base_model.load_model(values.base_model, folder, device, progress=values.runtime.progress)
    model = adapter.load_adapter(base, adapter_folder)
    with measured("evaluate", throughput, device) as work:
        answered, counts = test_set.predict(model, template, conversations, values.evaluate, device, progress=values.runtime.progress)
        work.count(turns=len(answered))
    base_metrics = json.loads(base_report.read_text(encoding="utf-8"))
    tuned_metrics = test_set.summarise(answered, counts)
    write_jsonl(predictions, answered)
    write_json(report, {**tuned_metrics, "delta": test_set.deltas(tuned_metrics, base_metrics)})
    html_report.write(page, conversations, read_jsonl(base_predictions), answered, base_metrics, tuned_metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("test", "manifests", "adapter-folder", "base-predictions", "base-report", "predictions", "report", "page", "throughput"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    evaluate(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
