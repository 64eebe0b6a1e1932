"""Fine-tune a LoRA adapter on prepared conversations.

reads   train and validation conversations, the manifest of the base model
writes  adapter_folder: weights, config, tokenizer and chat template; report: token accounting and losses; metrics/train_loss.csv and
        eval_loss.csv: curves; metrics/lengths.csv: a histogram of the train conversations' tokens
params  base_model, chat, data.on_invalid, sequence, lora, train, hardware
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora.core.dvc_lock import require_recorded
from qlora.core.errors import StoppedError
from qlora.model import adapter
from qlora.model.base import BaseModel, open_base_model
from qlora.model.config import check_context
from qlora.model.device import TRAINING_SETTINGS, peak_memory_bytes, require_compiler, set_up_device, translate_out_of_memory
from qlora.model.distributed import all_gather, broadcast, is_main_process, process_group
from qlora.model.manifest import verified_folder
from qlora.params import Params
from qlora.runtime import command, launcher
from qlora.runtime.provenance import record_environment
from qlora.runtime.signals import Interruption
from qlora.runtime.timing import timed
from qlora.training import describe
from qlora.training.checkpoints import Checkpoints, checkpoint_folder
from qlora.training.lora import adapter_model
from qlora.training.preflight import check_machine
from qlora.training.tokenization import EncodedSplit, tokenize_file
from qlora.training.trainer import ExactTrainer, make_trainer

TRACKED = ("base_model", "chat", "sequence", "lora", "train", "hardware")
logger = logging.getLogger("qlora.train")


class _Training(NamedTuple):
    trainer: ExactTrainer
    base: BaseModel
    accounting: dict[str, Any]
    lengths: list[int]
    """Tokens of each train conversation."""


def train(values: Params, *, train: Path, validation: Path, manifests: Path, adapter_folder: Path, report: Path, metrics: Path, notes: Path) -> None:
    """Train, resume from the last checkpoint, or reuse what an earlier run finished and DVC failed to store.

    Raises:
        StoppedError: a signal came; a checkpoint was saved.
        InputError: params, data or model are wrong, or a loss or weight is not finite.
        MachineError: no GPU, memory or room on the disk, or another process trains the same.
    """
    outputs = describe.Outputs(adapter_folder, report, metrics / "train_loss.csv", metrics / "eval_loss.csv", metrics / "lengths.csv")
    require_recorded([train, validation])
    params = {name: getattr(values, name).model_dump() for name in TRACKED} | {"data.on_invalid": values.data.on_invalid}
    folder = checkpoint_folder(params, [train, validation, manifests / f"{values.base_model.name}.json"])
    with process_group(), Interruption() as interruption:
        require_compiler(values.hardware)
        device = set_up_device(values.hardware, deterministic=values.train.deterministic, processes=values.hardware.num_processes)
        with Checkpoints(folder) as checkpoints:
            if broadcast(is_main_process() and checkpoints.reuse_finished(outputs._asdict())):
                return
            with translate_out_of_memory(TRAINING_SETTINGS, values):
                training = _prepare(values, train, validation, manifests, device, checkpoints, interruption)
                _run(training.trainer, checkpoints, interruption, notes)
            if is_main_process():
                adapter.publish(training.trainer.model, training.base.template, outputs.adapter_folder, values.base_model.name)
                describe.write_results(training.trainer, training.accounting, training.lengths, values.train.logging_steps, outputs)
                record_environment(notes, "train", device)
                checkpoints.finish(outputs._asdict())


def _prepare(
    values: Params, train: Path, validation: Path, manifests: Path, device: torch.device, checkpoints: Checkpoints, interruption: Interruption
) -> _Training:
    base = open_base_model(values, manifests)
    check_context(base.config, values.sequence.max_length)
    needed = check_machine(values, base.config)
    adapter.require_saveable(base.template)
    tokenized = tokenize_file(train, base.template, values.sequence)
    held_out = tokenize_file(validation, base.template, values.sequence) if values.train.eval_strategy != "no" else EncodedSplit()
    model = adapter_model(values, base.folder, device)
    checkpoints.require_room(model.get_nb_trainable_parameters()[0], values.train.optim, keep_best=values.train.keep == "best")
    trainer = make_trainer(values, model, base.template.tokenizer, tokenized.examples, held_out.examples, checkpoints, interruption)
    accounting = describe.accounting(trainer, tokenized, held_out, values)
    logger.info("estimated training memory: %s", needed.described())
    describe.log_plan(model, base.template.tokenizer, tokenized.examples, accounting)
    return _Training(trainer, base, accounting, tokenized.lengths)


def _run(trainer: ExactTrainer, checkpoints: Checkpoints, interruption: Interruption, notes: Path) -> None:
    """All updates, or those after the newest checkpoint."""
    checkpoint = checkpoints.newest()
    if checkpoint:
        logger.info("resuming from checkpoint %s", checkpoint)
    interruption.can_wait = True
    with timed("train", notes, lambda: peak_memory_bytes(trainer.args.device)) as work:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        work.count(**trainer.done_this_time())
    if trainer.stopped:
        state = trainer.state
        # The signal may have reached one process alone.
        name = next(filter(None, all_gather(interruption.noted)))
        raise StoppedError("stopped", f"{name} at step {state.global_step} of {state.max_steps}: a checkpoint was saved, run again to resume")
    trainer.require_finite()


def main() -> None:
    values, paths = command.stage_inputs(train, __doc__)
    # Hashed once and remembered, not by each process.
    verified_folder(values.base_model, paths["manifests"])
    launcher.launch_processes("stages.train", values.hardware, values.hardware.num_processes)
    train(values, **paths)


if __name__ == "__main__":
    command.run(main)
