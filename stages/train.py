"""Fine-tune a LoRA adapter on prepared conversations.

reads   train and validation conversations, the manifest of the base model
writes  adapter: weights, config, tokenizer and chat template; report: token accounting and losses; train_loss, eval_loss: curves;
        lengths: a histogram of the train conversations' tokens; made_by: the environment
params  base_model, chat, sequence, lora, train, hardware
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import set_seed

from qlora import adapter, base_model, command, environment, hardware, launch, params
from qlora.chat_template import FOLDER, ChatTemplate
from qlora.checkpoints import Checkpoints, fingerprint
from qlora.conversation import Conversation
from qlora.dvc_files import is_committed, recorded_outputs, require_recorded
from qlora.encoding import EncodedSplit, Example, encode_split, length_histogram, show
from qlora.errors import InputError, StoppedError
from qlora.hardware import TRAINING_SETTINGS, out_of_memory_named
from qlora.interruption import Interruption
from qlora.manifest import project_root
from qlora.new_adapter import begin_from, lora_config
from qlora.params import Params
from qlora.preflight import require_able
from qlora.provenance import note_environment
from qlora.ranks import from_first, gathered, is_first, leave, loss_of_others_named, one_after_another
from qlora.records import read_jsonl, write_csv, write_json
from qlora.sharding import share_layers
from qlora.throughput import measured
from qlora.trainer import ExactTrainer, make_trainer, smoothed

TRACKED = ("base_model", "chat", "sequence", "lora", "train", "hardware")


def train(values: Params, *, train: Path, validation: Path, manifests: Path, throughput: Path, made_by: Path, **outputs: Path) -> None:
    """Train, or go on from the last checkpoint, or take over what an earlier run finished and DVC could not take.

    Args:
        outputs: adapter_folder, report, train_loss, eval_loss and lengths.

    Raises:
        StoppedError: a signal came; a checkpoint was saved.
        InputError: params, data or model are wrong, or the training ended in numbers that are none.
        MachineError: no GPU, memory, room on the disk, or another process trains the same.
    """
    manifest = manifests / f"{values.base_model.name}.json"
    require_recorded([train, validation])
    with loss_of_others_named(), Interruption() as interruption:
        device = hardware.set_up(values.hardware, deterministic=values.train.deterministic, processes=values.hardware.num_processes)
        with Checkpoints(_checkpoint_folder(values, [train, validation, manifest])) as checkpoints:
            if from_first(is_first() and _take_over(checkpoints, outputs)):
                return
            with out_of_memory_named(TRAINING_SETTINGS, values):
                trained = _ready(values, train, validation, manifest, device, checkpoints, interruption)
                _run(trained.trainer, checkpoints, interruption, throughput)
            if is_first():
                _publish(trained, values, **outputs)
                note_environment(made_by, "train", device)
                checkpoints.finish(outputs)
        leave()


def _take_over(checkpoints: Checkpoints, outputs: Mapping[str, Path]) -> bool:
    """Whether an earlier run had finished and DVC did not take it; else what other trainings left is removed."""
    finished = checkpoints.finished()
    if finished and not is_committed(finished / "adapter_folder", str(outputs["adapter_folder"]), recorded_outputs()):
        print(f"taking over what was finished before, and DVC could not take: {finished}", flush=True)
        checkpoints.take_over(outputs)
        return True
    checkpoints.prune()
    return False


class _Training(NamedTuple):
    trainer: ExactTrainer
    template: ChatTemplate
    accounting: dict[str, Any]
    lengths: list[int]
    """Tokens of the train conversations."""


def _ready(
    values: Params, train: Path, validation: Path, manifest: Path, device: torch.device, checkpoints: Checkpoints, interruption: Interruption
) -> _Training:
    folder = base_model.verified_folder(values.base_model, manifest)
    config = base_model.load_config(folder)
    base_model.check_context(config, values.sequence.max_length)
    needed = require_able(values, config)
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    adapter.require_saveable(template)
    learned = _encode(train, template, values)
    held_back = _encode(validation, template, values) if values.train.eval_strategy != "no" else EncodedSplit()
    model = adapter_model(values, folder, device)
    checkpoints.require_room(model.get_nb_trainable_parameters()[0], values.train.optim, keep_best=values.train.keep == "best")
    trainer = make_trainer(values, model, template.tokenizer, learned.examples, held_back.examples, checkpoints, interruption)
    accounting = _accounting(trainer, learned, held_back, values)
    if is_first():
        print(f"memory of a training, by estimate: {needed.described()}")
        _introduce(model, template, learned.examples, accounting)
    return _Training(trainer, template, accounting, learned.lengths)


def _run(trainer: ExactTrainer, checkpoints: Checkpoints, interruption: Interruption, throughput: Path) -> None:
    """All updates, or those that are left after the newest checkpoint."""
    resumed = checkpoints.newest()
    if resumed and is_first():
        print(f"going on from {resumed}", flush=True)
    interruption.can_wait = True
    with measured("train", throughput, trainer.args.device) as work:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        work.count(**trainer.done_this_time())
    if trainer.stopped:
        state = trainer.state
        # Perhaps it came to one process alone.
        noted = next(filter(None, gathered(interruption.noted)))
        raise StoppedError("stopped", f"{noted} at step {state.global_step} of {state.max_steps}: a checkpoint was saved, run again to go on")
    _require_finite(trainer)


def _publish(trained: _Training, values: Params, *, adapter_folder: Path, report: Path, train_loss: Path, eval_loss: Path, lengths: Path) -> None:
    trainer = trained.trainer
    adapter.publish(trainer.model, trained.template, adapter_folder, values.base_model.name)
    curves = {"train": smoothed(trainer.losses(), values.train.logging_steps), "eval": trainer.validation_losses()}
    write_csv(train_loss, ["step", "loss"], curves["train"])
    write_csv(eval_loss, ["step", "loss"], curves["eval"])
    write_csv(lengths, ["tokens", "conversations"], length_histogram(trained.lengths))
    summary = {name: {"last": points[-1][1], "min": min(loss for _, loss in points)} for name, points in curves.items() if points}
    write_json(report, {**trained.accounting, "steps": trainer.state.global_step, "published_step": trainer.published_step(), "loss": summary})


def _checkpoint_folder(values: Params, inputs: list[Path]) -> Path:
    """Named by all that makes this training what it is."""
    code = [Path(__file__), *sorted(Path(params.__file__).parents[1].rglob("*.py")), *sorted(FOLDER.iterdir())]
    state = {name: getattr(values, name).model_dump() for name in TRACKED}
    return project_root() / ".dvc" / "tmp" / "checkpoints" / fingerprint(state, [*inputs, Path("requirements.txt"), *code])


def _encode(path: Path, template: ChatTemplate, values: Params) -> EncodedSplit:
    conversations = map(Conversation.from_record, read_jsonl(path))
    return encode_split(conversations, template, values.sequence, path.stem)


def adapter_model(values: Params, folder: Path, device: torch.device) -> PeftModel:
    """The base model with a new adapter on the device, or its part of one that several processes share."""
    shared = values.hardware.strategy == "fsdp2"
    with one_after_another() if shared else nullcontext():
        place = torch.device("cpu") if shared else device
        base = base_model.load_model(values.base_model, folder, place, progress=values.runtime.progress)
        # Before the adapter is made: its first weights are random.
        set_seed(values.train.seed)
        model = get_peft_model(base, lora_config(values.lora, base))
        begin_from(model, values.lora)
        if shared:
            share_layers(model, device, offload=values.hardware.offload_params)
    return model


def _accounting(trainer: ExactTrainer, learned: EncodedSplit, held_back: EncodedSplit, values: Params) -> dict[str, Any]:
    """What is trained on, in counts that don't depend on the clock."""
    accounting: dict[str, Any] = {}
    for name, split, rows in (("train", learned, trainer.train_rows), ("validation", held_back, trainer.eval_rows)):
        if split.examples:
            record = split.record()
            fill = record["tokens"]["out"] / (rows * values.sequence.max_length)
            accounting[name] = {**record, "rows": {"count": rows, "fill": fill}}
    return {**accounting, "steps_per_epoch": math.ceil(trainer.train_rows / values.train.batch_size)}


def _introduce(model: PeftModel, template: ChatTemplate, examples: Sequence[Example], accounting: dict[str, Any]) -> None:
    """What is about to be learned, for a person to see before it takes hours."""
    trainable, total = model.get_nb_trainable_parameters()
    print(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    conversations, tokens, rows = (accounting["train"][name] for name in ("conversations", "tokens", "rows"))
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in conversations["dropped"].items() if count)
    print(
        f"{conversations['out']:,} of {conversations['in']:,} conversations" + (f" (dropped: {dropped})" if dropped else "") + ": "
        f"{tokens['out']:,} tokens, {tokens['supervised_share']:.1%} of them learned, in {rows['count']:,} rows, {rows['fill']:.0%} full; "
        f"{accounting['steps_per_epoch']:,} steps an epoch"
    )
    for number, example in enumerate(examples[:2], start=1):
        print(f"\nexample {number}, the loss counts what stands in ⟦ ⟧ ({example.supervised} of {len(example.ids)} tokens):")
        print(show(example, template.tokenizer), flush=True)
    print(flush=True)


def _require_finite(trainer: ExactTrainer) -> None:
    """Raises InputError when the last update made a weight that is no number; no loss has shown it yet."""
    if not all(bool(weight.isfinite().all()) for weight in trainer.model.parameters() if weight.requires_grad):
        raise InputError(
            "train-not-finite",
            f"a weight of the adapter is not a finite number after step {trainer.state.global_step}, nothing was published: "
            "lower train.learning_rate and train again",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "validation", "manifests", "adapter-folder", "report", "train-loss", "eval-loss", "lengths", "throughput", "made-by"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    launch.begin_processes("stages.train", values, arguments.manifests, values.hardware.num_processes)
    train(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
