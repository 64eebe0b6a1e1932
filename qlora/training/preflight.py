"""Can this machine do what the params ask for? Number formats, attention, memory, and one pass over the longest rows, before anything long begins."""

import logging
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig, TrainerCallback
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from qlora.core.errors import MachineError
from qlora.model import attention
from qlora.model.device import peak_memory_bytes
from qlora.params import Params
from qlora.params.hardware import HardwareParams
from qlora.training.memory import GIB, Estimate, estimate, in_units

logger = logging.getLogger(__name__)
FLASH = {"flash_attention_2": (is_flash_attn_2_available, "flash-attn"), "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3")}
MARGIN = 1.1
"""An estimate this much above what is there may be wrong; one further above is not."""
CHANGES: tuple[tuple[str, Any, str], ...] = (
    ("hardware.activation_checkpointing", True, "20 to 45 % more time"),
    ("hardware.per_device_train_batch_size", 1, "the same updates, by more accumulation"),
    ("lora.lora_dropout", 0.0, "its masks and copies are kept for each layer"),
    ("base_model.load_in_4bit", True, "another base model: its baseline runs again; load_in_8bit: false with it"),
    ("base_model.load_in_8bit", True, "another base model: its baseline runs again; in place of 4 bits"),
    ("base_model.attn_implementation", attention.NAME, "no mask, no copies of keys and values; other last digits"),
    ("train.optim", "adamw_bnb_8bit", "other last digits"),
    ("train.optim", "paged_adamw_8bit", "other last digits"),
    ("sequence.max_length", "half", "conversations that are longer are treated as sequence.on_too_long says"),
    ("hardware.strategy", "fsdp2", "each pass waits for layers of other cards; 4 bits kept as base_model.dtype"),
)
"""Settings that save memory, and what each costs."""


def check_machine(params: Params, config: PretrainedConfig) -> Estimate:
    """What the training will need.

    Raises:
        MachineError: the card has no bfloat16, the attention's package is not there, or the memory does not suffice.
    """
    base = params.base_model
    if params.hardware.device == "cuda":
        asked = {"base_model.dtype": base.dtype, **({"base_model.bnb_4bit_compute_dtype": base.bnb_4bit_compute_dtype} if base.load_in_4bit else {})}
        halves = [name for name, dtype in asked.items() if dtype == "bfloat16"]
        if halves and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise MachineError(
                "bf16-missing", f"{' and '.join(halves)} = 'bfloat16', which {torch.cuda.get_device_name()} does not compute in: set float32"
            )
    if base.attn_implementation in FLASH:
        available, package = FLASH[base.attn_implementation]
        if not available():
            raise MachineError(
                "attention-missing",
                f"base_model.attn_implementation = {base.attn_implementation!r}: the package {package} is not installed; install it, "
                f"or choose {attention.NAME!r} or 'sdpa'",
            )
    if base.attn_implementation == attention.NAME:
        attention.refuse_model(config)
    needed = estimate(params, config)
    here = memory_bytes(params.hardware)
    if needed.total > here:
        message = too_much(needed, here, params, config)
        if needed.total > MARGIN * here:
            raise MachineError("memory-short", message)
        logger.warning("it may not fit: %s", message)
    return needed


def memory_bytes(hardware: HardwareParams) -> int:
    """What is left of the GPU that this process uses, or this process's part of what the machine has left for new ones."""
    if hardware.device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // hardware.processes_per_machine


def too_much(needed: Estimate, here: int, params: Params, config: PretrainedConfig) -> str:
    listed = "\n".join(f"  {line}" for line in advice(needed, params, config)) or "  no setting that saves memory is left: a smaller base model"
    return f"this training needs about {needed.described()}, there are {here / GIB:.2f} GiB. What would change that, by estimate:\n{listed}"


def advice(needed: Estimate, params: Params, config: PretrainedConfig) -> list[str]:
    """Each single change that saves a twentieth or more, the most first."""
    found: list[tuple[int, str]] = []
    for name, value, cost in CHANGES:
        section, _, key = name.partition(".")
        old = getattr(getattr(params, section), key)
        new = params.sequence.max_length // 2 if value == "half" else value
        if new == old or not _goes_with(params, key, new) or (new == attention.NAME and old not in ("sdpa", "eager")):
            continue
        changed = params.model_copy(update={section: getattr(params, section).model_copy(update={key: new})})
        try:
            if new == attention.NAME:
                attention.refuse_model(config)
            saved = needed.total - estimate(changed, config).total
        except MachineError:
            # Of this base model.
            continue
        if saved >= needed.total / 20:
            found.append((saved, f"{name}: {str(new).lower()}   -{in_units(saved)} ({cost})"))
    return [line for _, line in sorted(found, reverse=True)]


def _goes_with(params: Params, key: str, new: Any) -> bool:
    """Whether params.yaml would be taken with this change."""
    base, hardware = params.base_model, params.hardware
    if new == attention.NAME:
        return not (hardware.device == "cuda" and base.dtype == "float32")
    if new == "fsdp2":
        return hardware.num_processes > 1 and not base.load_in_8bit
    if key == "load_in_8bit" and (base.load_in_4bit or hardware.strategy == "fsdp2"):
        return False
    return not key.startswith("load_in_") or params.lora.init_lora_weights is True


class LongestPass(TrainerCallback):
    """Before the first update: one forward and backward pass over the longest rows that any micro-batch can have.

    It changes nothing: random state is put back, and gradients are thrown away. A compiled training takes less than this pass, and makes none.

    Args:
        batch: Makes the inputs.
        loss: Of a model and inputs.
    """

    def __init__(self, batch: Callable[[], dict[str, Any]], loss: Callable[[Any, dict[str, Any]], torch.Tensor]) -> None:
        self._batch, self._loss = batch, loss

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        if args.torch_compile:
            return
        device = args.device
        inputs = self._batch()
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            self._loss(model, inputs).backward()
        for weight in model.parameters():
            weight.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, peak = time.perf_counter() - began, peak_memory_bytes(device) / GIB
        logger.info("%s", f"memory check, longest batch ({inputs['input_ids'].numel():,} tokens): {seconds:.1f} s, peak {peak:.2f} GiB")
