"""The base model and its tokenizer, loaded from verified files."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils import logging as transformers_logging

from qlora.core.errors import InputError, MachineError, translate_errors
from qlora.core.files import read_record
from qlora.model import attention
from qlora.model.config import UNLOADABLE, load_config
from qlora.model.manifest import require_own_weights
from qlora.params.base_model import BaseModelParams


def load_model(
    params: BaseModelParams,
    folder: Path,
    device: torch.device,
    *,
    progress: bool,
    device_map: str | None = None,
    quantise_on: torch.device | None = None,
) -> PreTrainedModel:
    """The frozen base model, in 4 or 8 bits when the params say so, on the device or split over all GPUs.

    Args:
        device_map: "balanced" splits the layers over all GPUs; None puts the model on the device.
        quantise_on: Where each weight is quantised before it is put in its place; None: there.

    Raises:
        InputError: the weights are not the folder's own safetensors files, are no causal language model, or are quantised in another way than
            base_model asks for.
        MachineError: the attention implementation asked for is not installed, or does not compute this model's attention.
    """
    require_own_weights(folder)
    if params.attn_implementation == attention.NAME:
        attention.refuse_model(load_config(folder))
    if not progress:
        transformers_logging.disable_progress_bar()
    if (stored := _quantised_as(folder)) and not getattr(params, stored):
        raise InputError(
            "base-model-quantised",
            f"{folder} holds weights that bitsandbytes quantised, but base_model.{stored} is false: set it to true, or pin the unquantised model",
        )
    with quantised_on(quantise_on) if quantise_on else nullcontext():
        model, missing = _read(params, folder, device_map or {"": device})
    # transformers fills them with random numbers and goes on.
    if missing:
        raise InputError("base-model-unloadable", f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}: pin a whole model")
    _keep_4bit_backward_exact(model)
    if params.load_in_8bit:
        _keep_no_inputs_of_8bit(model)
    model.requires_grad_(False)
    return model


def _read(params: BaseModelParams, folder: Path, device_map: str | dict[str, torch.device]) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights that the files lack."""
    dtype: torch.dtype = getattr(torch, params.dtype)
    with translate_errors("base-model-unloadable", folder, UNLOADABLE, "pin another one"), _memory_errors_kept():
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=params.attn_implementation,
                quantization_config=_quantization(params),
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except ImportError as error:
            raise MachineError("attention-missing", f"base_model.attn_implementation = {params.attn_implementation!r}: {error}") from None
    return found[0], sorted(found[1]["missing_keys"])


@contextmanager
def _memory_errors_kept() -> Iterator[None]:
    """transformers puts an error of the quantisation into a report that it logs, and raises another one, which does not say that memory ran out."""
    reports: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reports.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    try:
        yield
    except RuntimeError as error:
        found = re.search(r".*(?:out of memory|can't allocate memory).*", "\n".join(reports))
        if not isinstance(error, torch.OutOfMemoryError) and found:
            raise torch.OutOfMemoryError(found[0].strip()) from error
        raise
    finally:
        library.removeHandler(handler)


def _quantization(params: BaseModelParams) -> BitsAndBytesConfig | None:
    if params.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not params.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=params.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=params.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, params.bnb_4bit_compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, params.bnb_4bit_quant_storage),
    )


class QuantiseElsewhere(Bnb4bitQuantize):
    """Quantises one weight at a time on a device of its own, and returns it in 4 bits."""

    def __init__(self, quantizer: Bnb4BitHfQuantizer, device: torch.device) -> None:
        super().__init__(quantizer)  # type: ignore[no-untyped-call]
        self.device = device

    def convert(self, input_dict: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        # The reader hands over one weight, alone or in a list.
        whole = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        sent: Any = {name: self.there(weight) for name, weight in whole.items()}
        made = super().convert(sent, *arguments, **options)
        return {name: self.back(weight, whole[name].device) for name, weight in made.items()}

    def there(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device)

    def back(self, weight: Any, place: torch.device) -> Any:
        """With its scales, which its layer knows too."""
        moved = weight.to(place)
        moved.module = weight.module
        return moved


@contextmanager
def quantised_on(device: torch.device) -> Iterator[None]:
    """Quantise on the device whatever is loaded meanwhile into the machine's memory.

    bitsandbytes has no fast kernel for that on CPUs: 70 billion weights would take each process three quarters of an hour there.
    """
    # transformers has no way to ask for it. It reads and quantises one weight after another where it quantises at all.
    before = Bnb4BitHfQuantizer.get_quantize_ops
    Bnb4BitHfQuantizer.get_quantize_ops = lambda quantizer: QuantiseElsewhere(quantizer, device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Bnb4BitHfQuantizer.get_quantize_ops = before  # type: ignore[method-assign]


def _keep_4bit_backward_exact(model: PreTrainedModel) -> None:
    """Forbid the inference layout of 4-bit weights on CPUs with avx512_bf16.

    The first forward pass in eval mode repacks them, and from then on the layer's product has no backward pass: training
    after a validation would go on with gradients that silently lack the base model's part.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute that types know


def _keep_no_inputs_of_8bit(model: PreTrainedModel) -> None:
    """Let go of what LLM.int8() keeps for gradients of its weights, which are frozen.

    Each product holds its input outside of what autograd saves: activation checkpointing would free none of them. It also logs a warning at each
    pass over inputs that are not float16.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            module.register_forward_hook(_forget_input)


def _forget_input(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    product: Any = output.grad_fn
    # The one keeps `A` on a CPU, the other its tensors on a GPU and in evaluation.
    for name, nothing in (("A", None), ("tensors", (None, None, None))):
        if hasattr(product, name):
            setattr(product, name, nothing)


def _quantised_as(folder: Path) -> str | None:
    """The param that asks for weights as bitsandbytes quantised those stored; None: it did not."""
    stored = read_record(folder / "config.json").get("quantization_config") or {}
    if stored.get("quant_method") != "bitsandbytes":
        return None
    return "load_in_8bit" if stored.get("load_in_8bit") else "load_in_4bit"


def layers_of(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The transformer's layers by their names, as the model's class knows them; none where it does not."""
    kinds: Any = model._no_split_modules or ()
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_stops: Sequence[int]) -> list[int]:
    """Every token that ends an answer: those of the chat template, and the model's and tokenizer's own.

    Raises:
        InputError: the model's own are no tokens of it.
    """
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    found = [token for token in [*template_stops, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])] if token is not None]
    tokens = int(model.config.get_text_config().vocab_size)
    if wrong := [token for token in found if type(token) is not int or not 0 <= token < tokens]:
        raise InputError(
            "base-model-unloadable",
            f"an answer would end with {wrong[0]!r}, which is not one of the base model's {tokens:,} tokens: fix eos_token_id in its "
            "generation_config.json or tokenizer_config.json and pin the model again",
        )
    return sorted(set(found))
