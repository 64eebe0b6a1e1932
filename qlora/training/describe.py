"""What a training is about to do and what it did, in counts that do not depend on the clock."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora.core.files import write_csv, write_json
from qlora.params import Params
from qlora.training.tokenization import EncodedSplit, Example, length_histogram, show
from qlora.training.trainer import ExactTrainer, smoothed

SHOWN_EXAMPLES = 2
logger = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """What the stage `train` writes, and what a finished training keeps until DVC has stored it."""

    adapter_folder: Path
    report: Path
    train_loss: Path
    eval_loss: Path
    lengths: Path


def accounting(trainer: ExactTrainer, train: EncodedSplit, validation: EncodedSplit, values: Params) -> dict[str, Any]:
    """Conversations, tokens and rows of each split, and updates per epoch."""
    record: dict[str, Any] = {}
    for name, split, rows in (("train", train, trainer.train_rows), ("validation", validation, trainer.eval_rows)):
        if split.examples:
            counts = split.record()
            fill = counts["tokens"]["out"] / (rows * values.sequence.max_length)
            record[name] = {**counts, "rows": {"count": rows, "fill": fill}}
    return {**record, "steps_per_epoch": math.ceil(trainer.train_rows / values.train.batch_size)}


def log_plan(model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], record: dict[str, Any]) -> None:
    """What is about to be trained on, for a person to see before it takes hours."""
    trainable, total = model.get_nb_trainable_parameters()
    logger.info("trainable parameters: %s", f"{trainable:,} of {total:,} ({trainable / total:.2%})")
    conversations, tokens, rows = (record["train"][name] for name in ("conversations", "tokens", "rows"))
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in conversations["dropped"].items() if count)
    logger.info(
        "%s",
        f"{conversations['out']:,} of {conversations['in']:,} conversations" + (f" (dropped: {dropped})" if dropped else "") + ": "
        f"{tokens['out']:,} tokens ({tokens['supervised_share']:.1%} supervised), in {rows['count']:,} rows ({rows['fill']:.0%} full); "
        f"{record['steps_per_epoch']:,} updates per epoch",
    )
    for number, example in enumerate(examples[:SHOWN_EXAMPLES], start=1):
        logger.info("\nexample %d, the loss counts what is in ⟦ ⟧ (%d of %d tokens):", number, example.supervised, len(example.ids))
        logger.info("%s\n", show(example, tokenizer))


def write_results(trainer: ExactTrainer, record: dict[str, Any], lengths: Sequence[int], logging_steps: int, outputs: Outputs) -> None:
    """The report, the loss curves in nats per token, and the histogram of lengths."""
    curves = {"train": smoothed(trainer.losses(), logging_steps), "eval": trainer.validation_losses()}
    write_csv(outputs.train_loss, ["step", "loss"], curves["train"])
    write_csv(outputs.eval_loss, ["step", "loss"], curves["eval"])
    write_csv(outputs.lengths, ["tokens", "conversations"], length_histogram(lengths))
    losses = {name: {"last": points[-1][1], "min": min(loss for _, loss in points)} for name, points in curves.items() if points}
    tokens = record["train"]["tokens"]
    used = {"supervised": tokens["supervised"], "context": tokens["out"] - tokens["supervised"]}
    drawn = [{"use": use, "tokens": count} for use, count in {**used, **{name: tokens[name] for name in ("dropped", "truncated")}}.items()]
    write_json(
        outputs.report, {**record, "plot": drawn, "steps": trainer.state.global_step, "published_step": trainer.published_step(), "loss": losses}
    )
