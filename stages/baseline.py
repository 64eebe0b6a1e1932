"""Measure the base model on the test set, once for every experiment on the same model and test set.

reads   test conversations, the manifest of the base model
writes  predictions: one line per assistant turn; batches: which turns were answered together; report: the metrics;
        made_by: the environment
params  base_model, chat, evaluate, hardware
"""

import argparse
from pathlib import Path

import torch

from qlora import base_model, command, environment, hardware, launch, params, test_set
from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation
from qlora.dvc_files import require_recorded
from qlora.params import Params
from qlora.provenance import note_environment
from qlora.ranks import is_first, leave, loss_of_others_named
from qlora.records import read_jsonl, write_json, write_jsonl
from qlora.throughput import measured


def baseline(values: Params, *, test: Path, manifests: Path, predictions: Path, batches: Path, report: Path, throughput: Path, made_by: Path) -> None:
    require_recorded([test])
    with loss_of_others_named():
        device = hardware.set_up(values.hardware, deterministic=False, processes=values.hardware.answering_processes)
        found = _measure(values, test, manifests, throughput, device)
        if is_first():
            write_jsonl(predictions, found.predictions)
            write_jsonl(batches, found.batches)
            write_json(report, test_set.summarise(found.predictions, found.counts))
            note_environment(made_by, "baseline", device)
        leave()


def _measure(values: Params, test: Path, manifests: Path, throughput: Path, device: torch.device) -> test_set.Measured:
    folder = base_model.verified_folder(values.base_model, manifests / f"{values.base_model.name}.json")
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    conversations = [Conversation.from_record(record) for record in read_jsonl(test)]
    model = base_model.load_model(
        values.base_model,
        folder,
        device,
        progress=values.runtime.progress,
        spread=values.hardware.strategy == "fsdp2",
    )
    with measured("baseline", throughput, device) as work, hardware.out_of_memory_named(hardware.ANSWERING_SETTINGS, values):
        found = test_set.predict(model, template, conversations, values.evaluate, device, progress=values.runtime.progress)
        work.count(turns=len(found.predictions))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("test", "manifests", "predictions", "batches", "report", "throughput", "made-by"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    launch.begin_processes("stages.baseline", values, arguments.manifests, values.hardware.answering_processes)
    baseline(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
