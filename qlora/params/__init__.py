"""params.yaml as one typed, frozen object; every mistake in it is reported at once. All stages run it and list the files of their sections.

Read with ruamel.yaml in YAML 1.2, the parser and dialect of DVC, so that what runs is what dvc.lock records:
PyYAML takes `2e-5` for a string.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora.core.errors import InputError
from qlora.core.files import require_file
from qlora.params.base_model import BaseModelParams
from qlora.params.chat import ChatParams
from qlora.params.data import DataParams
from qlora.params.evaluate import EvaluateParams
from qlora.params.hardware import HardwareParams
from qlora.params.lora import LoraParams
from qlora.params.predict import PredictParams
from qlora.params.runtime import RuntimeParams
from qlora.params.section import Section, describe, unknown_key
from qlora.params.sequence import SequenceParams
from qlora.params.train import TrainParams

MOST_BYTES = 100_000
MOST_MASKED_TOKENS = 2048
"""Of several rows under one mask: that of more takes over 4 MB a layer, and each token is compared with those of other rows in vain."""
SHOWN = 50
"""Mistakes that are listed."""


class Params(Section):
    """All of params.yaml."""

    data: DataParams
    base_model: BaseModelParams
    chat: ChatParams
    sequence: SequenceParams
    lora: LoraParams
    train: TrainParams
    predict: PredictParams
    evaluate: EvaluateParams
    hardware: HardwareParams
    runtime: RuntimeParams

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of each process per optimizer update."""
        return self.train.batch_size // (self.hardware.per_device_train_batch_size * self.hardware.num_processes)


def load(path: Path) -> Params:
    """Read and check the whole file.

    Raises:
        InputError: `params-missing`, `params-syntax`, or `params-invalid` with one line per mistake.
    """
    # Not the scanner in C, that DVC reads with: deeply nested brackets end the process there.
    return check(parse(path, YAML(typ="safe", pure=True)), str(path))


def parse(path: Path, yaml: YAML) -> dict[str, Any]:
    """The file's sections, unchecked, in the objects of this parser.

    Raises:
        InputError: `params-missing` or `params-syntax`.
    """
    try:
        require_file(path)
        if path.stat().st_size > MOST_BYTES:
            raise InputError("params-syntax", f"{path} has {path.stat().st_size:,} bytes, params have {MOST_BYTES:,} at most")
        record = yaml.load(path)
    except FileNotFoundError:
        raise InputError("params-missing", f"{path} does not exist: run from the repository's root") from None
    except (YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError, OverflowError) as error:
        # The parser's own errors, and those that it forgets to catch.
        raise InputError("params-syntax", f"{path} is not valid YAML 1.2: {str(error)[:1000] or type(error).__name__}") from None
    if not isinstance(record, dict) or not all(isinstance(values, dict) for values in record.values()):
        raise InputError("params-syntax", f"{path} must hold sections ({', '.join(Params.model_fields)}) with keys and values")
    return record


def check(record: dict[str, Any], source: str) -> Params:
    """Params from the parsed YAML; `source` names it in the message."""
    problems: list[str] = []
    sections: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        schema = field.annotation
        assert isinstance(schema, type)
        assert issubclass(schema, Section)
        try:
            sections[name] = schema.model_validate({str(key): value for key, value in record.get(name, {}).items()})
        except ValidationError as error:
            # A value that fits none of several types is one mistake, reported once per type.
            problems += dict.fromkeys(describe(name, schema, detail) for detail in error.errors())
    problems += [unknown_key(str(name), list(Params.model_fields)) for name in record if name not in Params.model_fields]
    params = Params.model_construct(**sections)
    problems += _between_sections(params)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
        raise InputError("params-invalid", f"{source} has {len(problems)} mistake(s); nothing was run:\n{listed}")
    return params


def _between_sections(params: Params) -> list[str]:
    """Impossible pairs across sections; a section that is wrong in itself is absent here."""
    problems = []
    train, hardware, data = (getattr(params, name, None) for name in ("train", "hardware", "data"))
    if train and hardware and train.batch_size % (hardware.per_device_train_batch_size * hardware.num_processes):
        problems.append(
            f"train.batch_size = {train.batch_size} is not a multiple of hardware.per_device_train_batch_size = "
            f"{hardware.per_device_train_batch_size}" + (f" x num_processes = {hardware.num_processes}" if hardware.num_processes > 1 else "")
        )
    if train and data and data.validation_fraction == 0 and train.eval_strategy != "no":
        problems.append(
            f"train.eval_strategy = {train.eval_strategy!r} needs validation rows, but data.validation_fraction = 0: "
            "set the one to 'no' or the other above 0"
        )
    return [*problems, *_first_weights(params), *_distributed(params), *_attention(params)]


def _first_weights(params: Params) -> list[str]:
    """Parts of the base model's weights can't be taken out of rounded ones."""
    base, lora = (getattr(params, name, None) for name in ("base_model", "lora"))
    if not (base and lora) or lora.init_lora_weights is True or (base.dtype == "float32" and not base.is_quantised):
        return []
    quantised = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(base, name)), None)
    rounded = f"base_model.{quantised} = true" if quantised else f"base_model.dtype = {base.dtype!r}"
    return [
        f"lora.init_lora_weights = {lora.init_lora_weights!r} trains beside what is left of each base weight, which {rounded} rounds: the adapter "
        "would be of another model than the pinned one. Set init_lora_weights to true, or take a float32 base model that is not quantised"
    ]


def _distributed(params: Params) -> list[str]:
    """What layers sharded over processes rule out."""
    hardware, base, lora = (getattr(params, name, None) for name in ("hardware", "base_model", "lora"))
    if not hardware or hardware.strategy != "fsdp2":
        return []
    problems = []
    if base and base.load_in_4bit and base.bnb_4bit_quant_storage == "uint8":
        problems.append(
            "base_model.bnb_4bit_quant_storage = 'uint8': fsdp2 is only tried with 4-bit weights kept as a floating type, which FSDP's other "
            f"implementations ask for: set it to base_model.dtype, {base.dtype!r}"
        )
    if base and base.load_in_8bit:
        problems.append(
            "base_model.load_in_8bit = true: bitsandbytes computes with a copy of its own of the 8-bit weights, which fsdp2 can't shard: set it to "
            "false (and load_in_4bit to true), or hardware.strategy to 'ddp'"
        )
    if lora and lora.modules_to_save:
        problems.append("lora.modules_to_save trains whole layers, which fsdp2 shards: set it to null, or hardware.strategy to 'ddp'")
    return problems


def _attention(params: Params) -> list[str]:
    """A mask of all rows against all rows."""
    hardware, base, sequence = (getattr(params, name, None) for name in ("hardware", "base_model", "sequence"))
    if hardware and base and hardware.device == "cpu" and base.attn_implementation not in ("varlen", "sdpa", "eager"):
        return [f"base_model.attn_implementation = {base.attn_implementation!r} needs a GPU, but hardware.device = 'cpu': choose 'varlen' or 'sdpa'"]
    if hardware and base and hardware.device == "cuda" and base.attn_implementation == "varlen" and base.dtype == "float32":
        return ["base_model.attn_implementation = 'varlen' computes in 16 bits on a GPU, but base_model.dtype = 'float32': choose 'sdpa'"]
    if not (hardware and base and sequence) or sequence.packing == "none" or base.attn_implementation not in ("sdpa", "eager"):
        return []
    rows = hardware.per_device_train_batch_size
    tokens = rows * sequence.max_length
    if rows == 1 or tokens <= MOST_MASKED_TOKENS:
        return []
    return [
        f"hardware.per_device_train_batch_size = {rows} with packing under {base.attn_implementation} compares {tokens:,} x {tokens:,} tokens in "
        "each layer: set it to 1 (accumulation reaches train.batch_size), or base_model.attn_implementation to one that knows where rows end "
        "(varlen, flash_attention_2)"
    ]
