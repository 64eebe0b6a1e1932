"""Fine-tune a LoRA adapter on prepared conversations.

reads   train and validation conversations, the manifest of the base model
writes  adapter: weights, config, tokenizer and chat template; report: token accounting and losses; train_loss, eval_loss: curves
params  base_model, chat, sequence, lora, train, hardware
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import set_seed

from qlora import adapter, base_model, command, environment, hardware, params
from qlora.chat_template import FOLDER, ChatTemplate
from qlora.checkpoints import fingerprint, newest_complete
from qlora.conversation import Conversation
from qlora.encoding import Example, encode_split, show
from qlora.errors import InputError
from qlora.manifest import project_root
from qlora.params import Params
from qlora.records import read_jsonl, write_csv, write_json
from qlora.throughput import measured
from qlora.trainer import ExactEvalTrainer, lora_config, make_trainer

TRACKED = ("base_model", "chat", "sequence", "lora", "train", "hardware")


def train(
    values: Params,
    *,
    train: Path,
    validation: Path,
    manifests: Path,
    adapter_folder: Path,
    report: Path,
    train_loss: Path,
    eval_loss: Path,
    throughput: Path,
) -> None:
    device = hardware.set_up(values.hardware, deterministic=values.train.deterministic)
    manifest = manifests / f"{values.base_model.name}.json"
    folder = base_model.verified_folder(values.base_model, manifest)
    base_model.check_context(folder, values.sequence.max_length)
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    examples, dropped = _encode(train, template, values)
    held_back, held_back_dropped = _encode(validation, template, values) if values.train.eval_strategy != "no" else ([], {})
    model = _adapter_model(values, folder, device)
    _introduce(model, template, examples)

    inputs = [
        train,
        validation,
        manifest,
        Path("requirements.txt"),
        Path(__file__),
        *sorted(Path(params.__file__).parents[1].rglob("*.py")),
        *sorted(FOLDER.iterdir()),
    ]
    state = {name: getattr(values, name).model_dump() for name in TRACKED}
    checkpoints = project_root() / ".dvc" / "tmp" / "checkpoints" / fingerprint(state, inputs)
    trainer = make_trainer(values, model, template.tokenizer, examples, held_back, checkpoints)
    with measured("train", throughput, device) as work:
        resumed = newest_complete(checkpoints)
        if resumed:
            print(f"going on from {resumed}", flush=True)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        work.count(tokens=int(trainer.state.num_input_tokens_seen), steps=trainer.state.global_step)

    _require_finite(trainer)
    adapter.publish(model, template.tokenizer, adapter_folder, values.base_model.name)
    history = trainer.state.log_history
    write_csv(train_loss, ["step", "loss"], [[entry["step"], entry["loss"]] for entry in history if "loss" in entry])
    write_csv(eval_loss, ["step", "loss"], [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry])
    write_json(report, {**_accounting(trainer, examples, values), "dropped": {"train": dropped, "validation": held_back_dropped}})
    shutil.rmtree(checkpoints, ignore_errors=True)


def _encode(path: Path, template: ChatTemplate, values: Params) -> tuple[list[Example], dict[str, int]]:
    conversations = map(Conversation.from_record, read_jsonl(path))
    return encode_split(conversations, template, values.sequence, path.stem)


def _adapter_model(values: Params, folder: Path, device: Any) -> PeftModel:
    base = base_model.load_model(values.base_model, folder, device, progress=values.runtime.progress)
    # Before the adapter is made: its first weights are random.
    set_seed(values.train.seed)
    return get_peft_model(base, lora_config(values.lora))


def _introduce(model: PeftModel, template: ChatTemplate, examples: list[Example]) -> None:
    """What is about to be learned, for a person to see before it takes hours."""
    trainable, total = model.get_nb_trainable_parameters()
    print(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
    for number, example in enumerate(examples[:2], start=1):
        print(f"\nexample {number}, the loss counts what stands in ⟦ ⟧ ({example.supervised} of {len(example.ids)} tokens):")
        print(show(example, template.tokenizer), flush=True)
    print(flush=True)


def _require_finite(trainer: ExactEvalTrainer) -> None:
    """Raises InputError, before anything is published, when the training ended in numbers that are none."""
    losses = [(entry["step"], entry[name]) for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
    step = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if step is not None or not all(bool(weight.isfinite().all()) for weight in trainer.model.parameters() if weight.requires_grad):
        place = f"the loss at step {step}" if step is not None else "a weight of the adapter"
        raise InputError("train-not-finite", f"{place} is not a finite number, nothing was published: lower train.learning_rate and train again")


def _accounting(trainer: ExactEvalTrainer, examples: list[Example], values: Params) -> dict[str, Any]:
    """What was trained on, in counts that don't depend on the clock, and the losses."""
    tokens = sum(len(example.ids) for example in examples)
    rows = len(trainer.train_dataset)
    history = trainer.state.log_history
    losses = {
        "train": [entry["loss"] for entry in history if "loss" in entry],
        "eval": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
    }
    return {
        "conversations": len(examples),
        "tokens": {"total": tokens, "supervised": sum(example.supervised for example in examples)},
        "rows": {"count": rows, "fill": tokens / (rows * values.sequence.max_length)},
        "steps": trainer.state.global_step,
        "loss": {name: {"last": series[-1], "min": min(series)} for name, series in losses.items() if series},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "validation", "manifests", "adapter-folder", "report", "train-loss", "eval-loss", "throughput"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    train(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
