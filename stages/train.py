"""Fine-tune a LoRA adapter on prepared conversations.

reads   train and validation conversations, the manifest of the base model
writes  adapter: weights, config, tokenizer and chat template; report: token accounting and losses; train_loss, eval_loss: curves;
        lengths: a histogram of the train conversations' tokens
params  base_model, chat, sequence, lora, train, hardware
"""

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import set_seed

from qlora import adapter, base_model, command, environment, hardware, params
from qlora.chat_template import FOLDER, ChatTemplate
from qlora.checkpoints import fingerprint, newest_complete
from qlora.conversation import Conversation
from qlora.encoding import EncodedSplit, Example, encode_split, length_histogram, show
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
    lengths: Path,
    throughput: Path,
) -> None:
    device = hardware.set_up(values.hardware, deterministic=values.train.deterministic)
    manifest = manifests / f"{values.base_model.name}.json"
    folder = base_model.verified_folder(values.base_model, manifest)
    base_model.check_context(folder, values.sequence.max_length)
    template = ChatTemplate(base_model.load_tokenizer(folder), values.chat)
    adapter.require_saveable(template)
    learned = _encode(train, template, values)
    held_back = _encode(validation, template, values) if values.train.eval_strategy != "no" else EncodedSplit()
    model = _adapter_model(values, folder, device)

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
    trainer = make_trainer(values, model, template.tokenizer, learned.examples, held_back.examples, checkpoints)
    accounting = _accounting(trainer, learned, held_back, values)
    _introduce(model, template, learned.examples, accounting)
    with measured("train", throughput, device) as work:
        resumed = newest_complete(checkpoints)
        if resumed:
            print(f"going on from {resumed}", flush=True)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        work.count(tokens=int(trainer.state.num_input_tokens_seen), steps=trainer.state.global_step)

    _require_finite(trainer)
    adapter.publish(model, template, adapter_folder, values.base_model.name)
    losses = {name: _losses(trainer, name) for name in ("loss", "eval_loss")}
    write_csv(train_loss, ["step", "loss"], losses["loss"])
    write_csv(eval_loss, ["step", "loss"], losses["eval_loss"])
    write_csv(lengths, ["tokens", "conversations"], length_histogram(learned.lengths))
    series = {"train": losses["loss"], "eval": losses["eval_loss"]}
    summary = {name: {"last": points[-1][1], "min": min(loss for _, loss in points)} for name, points in series.items() if points}
    write_json(report, {**accounting, "steps": trainer.state.global_step, "loss": summary})
    shutil.rmtree(checkpoints, ignore_errors=True)


def _encode(path: Path, template: ChatTemplate, values: Params) -> EncodedSplit:
    conversations = map(Conversation.from_record, read_jsonl(path))
    return encode_split(conversations, template, values.sequence, path.stem)


def _adapter_model(values: Params, folder: Path, device: Any) -> PeftModel:
    base = base_model.load_model(values.base_model, folder, device, progress=values.runtime.progress)
    # Before the adapter is made: its first weights are random.
    set_seed(values.train.seed)
    return get_peft_model(base, lora_config(values.lora))


def _accounting(trainer: ExactEvalTrainer, learned: EncodedSplit, held_back: EncodedSplit, values: Params) -> dict[str, Any]:
    """What is trained on, in counts that don't depend on the clock."""
    accounting: dict[str, Any] = {}
    for name, split, dataset in (("train", learned, trainer.train_dataset), ("validation", held_back, trainer.eval_dataset)):
        if split.examples:
            record = split.record()
            fill = record["tokens"]["out"] / (len(dataset) * values.sequence.max_length)
            accounting[name] = {**record, "rows": {"count": len(dataset), "fill": fill}}
    return {**accounting, "steps_per_epoch": math.ceil(len(trainer.train_dataset) / values.train.batch_size)}


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


def _losses(trainer: ExactEvalTrainer, name: str) -> list[tuple[int, float]]:
    """(step, loss) for each time it was logged."""
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def _require_finite(trainer: ExactEvalTrainer) -> None:
    """Raises InputError, before anything is published, when the training ended in numbers that are none."""
    losses = sorted(_losses(trainer, "loss") + _losses(trainer, "eval_loss"))
    step = next((step for step, loss in losses if not math.isfinite(loss)), None)
    if step is not None or not all(bool(weight.isfinite().all()) for weight in trainer.model.parameters() if weight.requires_grad):
        place = f"the loss at step {step}" if step is not None else "a weight of the adapter"
        raise InputError("train-not-finite", f"{place} is not a finite number, nothing was published: lower train.learning_rate and train again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "validation", "manifests", "adapter-folder", "report", "train-loss", "eval-loss", "lengths", "throughput"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    train(values, **vars(arguments))


if __name__ == "__main__":
    command.run(main)
