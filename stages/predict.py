"""Run a model on the test set: the likelihood of every reference answer, and the model's own answer to every prompt.

dvc.yaml runs this program as two stages: `baseline` without an adapter, once for all experiments on the same model and test set, and `predict`
with one. Nothing is scored here.

reads   test conversations, the manifest of the base model, adapter
writes  predictions: one line per assistant turn and seed; beside them *_batches.jsonl: which turns were answered together, and
        *_counts.json: conversations measured and left out, by reason
params  base_model, chat, data.on_invalid, predict, hardware
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.core.conversation import read_conversations
from qlora.core.dvc_lock import require_recorded, unfinished_folder
from qlora.core.files import write_json, write_jsonl
from qlora.model.base import BaseModel, open_base_model
from qlora.model.device import PREDICTION_SETTINGS, peak_memory_bytes, require_compiler, set_up_device, translate_out_of_memory
from qlora.model.distributed import all_gather, broadcast, is_main_process, process_group
from qlora.model.loading import load_model
from qlora.model.manifest import verified_folder
from qlora.params import Params
from qlora.prediction import test_set
from qlora.prediction.journal import Journal
from qlora.runtime import command, launcher
from qlora.runtime.provenance import describe, record_environment
from qlora.runtime.signals import stopping_with
from qlora.runtime.timing import timed

TRACKED = ("base_model", "chat", "predict", "hardware")


def predict(values: Params, *, test: Path, manifests: Path, predictions: Path, notes: Path, adapter_folder: Path | None = None) -> None:
    """Answer the test set with the base model, or with the adapter on it; what an interrupted run of the same finished is reused.

    Raises:
        StoppedError: a signal came; what was finished is kept.
        InputError: params, test set, base model or adapter are wrong, or do not belong together.
        MachineError: no GPU or memory, or another process of this run ended.
    """
    stage = "predict" if adapter_folder else "baseline"
    require_recorded([test, *filter(None, [adapter_folder])])
    conversations = read_conversations(test)
    with process_group():
        require_compiler(values.hardware)
        device = set_up_device(values.hardware, deterministic=False, processes=values.hardware.prediction_processes)
        base = open_base_model(values, manifests)
        inputs = [test, manifests / f"{values.base_model.name}.json", *filter(None, [adapter_folder])]
        with translate_out_of_memory(PREDICTION_SETTINGS, values):
            model = _model(values, base, device, adapter_folder)
            with _journal(values, stage, inputs, device) as journal:
                resumable = stopping_with(lambda: f"{journal.summary()} are kept, run again to resume")
                with resumable, timed(stage, notes, lambda: peak_memory_bytes(device)) as work:
                    found = test_set.predict(model, base.template, conversations, values.predict, device, journal, progress=values.runtime.progress)
                    work.count(turns=len(found.predictions) - sum(all_gather(journal.reused_answers)))
                if is_main_process():
                    _write(found, predictions)
                    record_environment(notes, stage, device)
                    journal.remove()


def _journal(values: Params, stage: str, inputs: list[Path], device: torch.device) -> Journal:
    """Named by all that may change an answer, the kind of machine included: half of the answers of another card would make a third result."""
    tracked = {name: getattr(values, name).model_dump() for name in TRACKED} | {"data.on_invalid": values.data.on_invalid}
    named = tracked | {"environment": all_gather(describe(device))}
    return Journal(broadcast(unfinished_folder("answers", stage, named, inputs) if is_main_process() else None))


def _write(found: test_set.Measured, predictions: Path) -> None:
    write_jsonl(predictions, found.predictions)
    write_jsonl(predictions.with_name(f"{predictions.stem}_batches.jsonl"), found.batches)
    write_json(predictions.with_name(f"{predictions.stem}_counts.json"), found.counts)


def _model(values: Params, base: BaseModel, device: torch.device, adapter_folder: Path | None) -> PreTrainedModel:
    model = load_model(values.base_model, base.folder, device, progress=values.runtime.progress, device_map=values.hardware.device_map)
    if adapter_folder is None:
        return model
    from qlora.model.adapter import load_adapter  # noqa: PLC0415 - PEFT takes a second that the baseline need not pay

    adapted: Any = load_adapter(model, adapter_folder, values.base_model.name)
    return adapted  # type: ignore[no-any-return] # PEFT's wrapper has the model's methods


def main() -> None:
    values, paths = command.stage_inputs(predict, __doc__)
    # Hashed once and remembered, not by each process.
    verified_folder(values.base_model, paths["manifests"])
    launcher.launch_processes("stages.predict", values.hardware, values.hardware.prediction_processes)
    predict(values, **paths)


if __name__ == "__main__":
    command.run(main)
