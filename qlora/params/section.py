"""The base of every section's schema, and the words in which a wrong value is reported."""

from difflib import get_close_matches
from reprlib import Repr
from typing import Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic_core import ErrorDetails

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 3


class Section(BaseModel):
    """One section of params.yaml: immutable, no conversions (but int to float), no unknown keys, no defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def describe(section: str, schema: type[Section], error: ErrorDetails) -> str:
    """One line for one wrong value: dotted path, value, what is allowed, nearest name.

    `data.on_invalid = 'dorp' is not allowed: must be one of 'drop', 'error'; did you mean 'drop'?`
    """
    if not error["loc"]:
        # A rule over several values of the section: its message names them.
        return f"{section}: {error['msg'].removeprefix('Value error, ')}"
    field = str(error["loc"][0])
    place, value = f"{section}.{field[:100]}", error["input"]
    if error["type"] == "extra_forbidden":
        return unknown_key(place, [f"{section}.{name}" for name in schema.model_fields])
    if error["type"] == "missing":
        return f"{place} is missing"
    choices, others = _choices(schema, field)
    if choices and error["type"] not in ("too_long", "too_short"):
        allowed = f"one of {', '.join(map(repr, choices))}" + "".join(f" or {other}" for other in others)
        nearest = _nearest(str(value)[:100], choices) if isinstance(value, str | int | float) else ""
        return f"{place} = {_short(value)} is not allowed: must be {allowed}{nearest}"
    return f"{place} = {_short(value)} is not allowed: must be {error['msg'].removeprefix('Input should be ')}"


def _short(value: object) -> str:
    """A value that stands for itself a million times, as YAML's anchors allow, is not written out."""
    return _REPR.repr(value)


_ANSWERS = "max_new_tokens do_sample temperature top_p generation_seeds turns num_examples on_too_long"
_BATCHES = "predict.batch_tokens, rows x (longest prompt + max_new_tokens)"
MOVED = {f"evaluate.{name}": f"predict.{name}" for name in _ANSWERS.split()} | {f"{name}.batch_size": _BATCHES for name in ("evaluate", "predict")}
"""Old names of params with their new ones: what changes answers was split from what only scoring reads, and batches have a budget of tokens."""


OTHER_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps, a number of updates",
    "gradient_accumulation_steps": "train.batch_size, the rows of an update: the steps follow from it",
    "grad_accum": "train.batch_size, the rows of an update: the accumulation follows from it",
    "per_device_train_batch_size": "hardware.per_device_train_batch_size",
    "micro_batch_size": "hardware.per_device_train_batch_size",
    "per_device_eval_batch_size": "predict.batch_tokens",
    "gradient_checkpointing": "hardware.activation_checkpointing",
    "bf16": "base_model.dtype: bfloat16",
    "fp16": "base_model.dtype: bfloat16",
    "max_seq_length": "sequence.max_length",
    "max_seq_len": "sequence.max_length",
    "cutoff_len": "sequence.max_length",
    "model_max_length": "sequence.max_length",
    "packing": "sequence.packing",
    "train_on_inputs": "sequence.assistant_only_loss, which says the opposite",
    "completion_only_loss": "sequence.assistant_only_loss",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "model_name_or_path": "base_model.name, after `python -m tools.pin NAME --path DIR`",
    "model_name": "base_model.name, after `python -m tools.pin NAME --path DIR`",
    "base_model": "base_model.name, after `python -m tools.pin NAME --path DIR`",
    "dataset": "data.train_file and data.test_file",
    "dataset_name": "data.train_file and data.test_file",
    "val_size": "data.validation_fraction",
    "save_steps": "runtime.save_steps",
    "save_strategy": "runtime.save_steps or runtime.save_minutes",
    "dataset_num_proc": "runtime.num_workers",
    "max_tokens": "predict.max_new_tokens",
    "deepspeed": "hardware.strategy",
    "fsdp": "hardware.strategy: fsdp2",
    "load_best_model_at_end": "train.keep: best",
    "optimizer": "train.optim",
    "clip_grad_norm": "train.max_grad_norm",
    "logging_dir": "runtime.report_to",
}
"""What TRL, PEFT, transformers, axolotl, LLaMA-Factory and Unsloth call a value, by any section; and its name here."""


def unknown_key(place: str, known: list[str]) -> str:
    """Why this is no param, and what it is called.

    Args:
        place: section.key, or a section alone.
    """
    if place in MOVED:
        return f"{place} is now {MOVED[place]}: " + ("set that" if MOVED[place] == _BATCHES else "move it there")
    if (other := OTHER_NAMES.get(place.rpartition(".")[2])) and other != place:
        return f"{place} is not a parameter; here it is {other}"
    # By the key alone: all keys of a section begin alike.
    keys = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(place.rpartition(".")[2], keys, n=1, cutoff=0.6)
    return f"{place} is not a parameter" + (f"; did you mean {keys[close[0]]!r}?" if close else "; known: " + ", ".join(known))


def _choices(schema: type[Section], field: str) -> tuple[list[str], list[str]]:
    """The literal values that a field takes, and the names of the other types that it takes."""
    annotation = schema.model_fields[field].annotation
    candidates = [annotation] if get_origin(annotation) is Literal else list(get_args(annotation))
    literals = [
        str(choice).lower() if choice is True else str(choice)
        for candidate in candidates
        if get_origin(candidate) is Literal
        for choice in get_args(candidate)
    ]
    others = [str(getattr(candidate, "__name__", candidate)) for candidate in candidates if get_origin(candidate) is not Literal]
    return literals, others


def _nearest(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
