"""How much memory a training needs on one device, by what takes it, from the base model's shape alone.

The model is built without its weights (torch's fake tensors have shapes and types, but no memory), with the adapter that the params ask for, and
one forward pass over the longest rows shows what autograd keeps for the backward pass. So that is counted, whatever the architecture; attention
alone stands in for the fused kernels, which keep queries, keys, values, the output and a number per head and token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from qlora.core.errors import translate_errors
from qlora.model import attention
from qlora.model.config import UNLOADABLE
from qlora.model.loading import layers_of
from qlora.params import Params
from qlora.params.base_model import BaseModelParams
from qlora.training.lora import leave_inputs_to_autocast, with_adapter

GIB, MIB = 2**30, 2**20
CONTEXT_BYTES = 2**29
"""Of a GPU's driver and libraries, which torch does not count."""
FLOAT = 4
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "paged_adamw_32bit": 0, "paged_adamw_8bit": 0}
"""Per trained weight. A paged optimizer's state moves to the machine's memory where there is no room for it."""
NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Weights per scale, and scales per scale of scales, of bitsandbytes."""
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
"""Logits that TRL's loss holds at once: so many tokens by so many words."""
STAND_IN = "counted"


class Estimate(NamedTuple):
    """Bytes on one device at the worst moment of a training, and the arithmetic of a token."""

    weights: int
    """Of the frozen base model; under fsdp2 this process's part, and what it gathers."""
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass."""
    temporary: int
    """What the backward pass of one layer, or the loss, takes for a moment."""
    context: int
    flops_per_token: float
    """Of forward and backward pass."""

    @property
    def parts(self) -> dict[str, int]:
        return dict(list(self._asdict().items())[:-1])

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def described(self) -> str:
        """The total and its parts, in one unit."""
        unit = GIB if self.total >= GIB else MIB
        parts = ", ".join(f"{part} {size / unit:.2f}" for part, size in self.parts.items() if size)
        return f"{in_units(self.total)} ({parts})"


def in_units(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def estimate(params: Params, config: PretrainedConfig, *, attended: float | None = None) -> Estimate:
    """Of a training by these params, of a base model of this shape.

    Args:
        attended: Tokens that a token attends to on average; None: half a row.

    Raises:
        InputError: no model can be made of the config, or it has no such layers to adapt.
    """
    with translate_errors("base-model-unloadable", f"the config of base_model.name = {params.base_model.name!r}", UNLOADABLE, "pin another one"):
        return _estimate(params, config, attended)


def _estimate(params: Params, config: PretrainedConfig, attended: float | None) -> Estimate:
    hardware, base = params.hardware, params.base_model
    tokens = hardware.per_device_train_batch_size * params.sequence.max_length
    _register_attention(params)
    model = _model(params, config)
    with FakeTensorMode():
        _make_fake(model, params)
        kept = _kept_bytes(model, params)
    inner: Any = model.get_base_model()
    prefixes = tuple(f"{name}." for name in layers_of(inner))
    frozen = {name: weight for name, weight in inner.named_parameters() if not weight.requires_grad}
    sizes = {name: _bytes(weight, base, quantised=name.startswith(prefixes)) for name, weight in frozen.items()}
    trained = sum(weight.numel() for weight in inner.parameters() if weight.requires_grad)
    text = config.get_text_config()
    element = getattr(torch, base.dtype).itemsize
    layers = int(text.num_hidden_layers)
    in_layers = {name: size for name, size in sizes.items() if name.startswith(prefixes)}
    head = max((size for name, size in sizes.items() if name not in in_layers), default=0)
    sharded = hardware.strategy == "fsdp2"
    # Of a sharded model: the layer in use and the next on its way, and the head; bitsandbytes' scales are no weights, and whole everywhere.
    scales = sum(_scale_bytes(frozen[name], base) for name in in_layers) if base.is_quantised else 0
    gathered = 2 * sum(in_layers.values()) // layers + head if sharded else 0
    resting = sum(sizes.values()) - scales - (sum(in_layers.values()) - scales if hardware.offload_params else 0)
    held = scales + resting // (hardware.num_processes if sharded else 1)
    return Estimate(
        weights=held + gathered,
        adapter=trained * FLOAT,
        # DDP gathers them in buckets of its own.
        gradients=trained * FLOAT * (2 if hardware.num_processes > 1 and not sharded else 1),
        optimizer=trained * OPTIMIZER_BYTES[params.train.optim],
        activations=kept // layers + layers * tokens * int(text.hidden_size) * element if hardware.activation_checkpointing else kept,
        temporary=_temporary_bytes(params, text, [frozen[name] for name in in_layers]),
        context=CONTEXT_BYTES if hardware.device == "cuda" else 0,
        flops_per_token=_flops_per_token(params, inner, prefixes, attended),
    )


def _temporary_bytes(params: Params, text: PretrainedConfig, in_layers: Sequence[torch.Tensor]) -> int:
    """Of the loss, or of a layer's backward pass, where a quantised weight is unpacked, whichever takes more."""
    tokens = params.hardware.per_device_train_batch_size * params.sequence.max_length
    element: int = getattr(torch, params.base_model.dtype).itemsize
    largest = max((weight.numel() for weight in in_layers), default=0)
    widest = max((max(weight.shape) for weight in in_layers), default=0)
    logits = min(tokens, HEAD_TOKENS) * min(int(text.vocab_size), HEAD_WORDS)
    loss = tokens * int(text.hidden_size) * (FLOAT + element) + logits * element
    layer = 3 * tokens * widest * element + (2 * largest * element if params.base_model.is_quantised else 0)
    return max(loss, layer)


def _model(params: Params, config: PretrainedConfig) -> Any:
    """The adapter model, of tensors without memory."""
    # Not in FakeTensorMode, which some architectures' buffers can't be made in.
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, params.base_model.dtype), attn_implementation=STAND_IN)
        base.requires_grad_(False)
        # Other first weights have the same shapes, and are computed from weights.
        lora = params.lora.model_copy(update={"init_lora_weights": True})
        return with_adapter(base, lora).train()


def _make_fake(model: Any, params: Params) -> None:
    """Fake tensors in place of the model's, in the types that a training has them in."""
    leave_inputs_to_autocast(model, params)
    # One for one: embeddings and output head may be the same.
    made = {
        id(weight): torch.nn.Parameter(
            torch.empty(weight.shape, dtype=torch.float32 if weight.requires_grad else weight.dtype), requires_grad=weight.requires_grad
        )
        for weight in model.parameters()
    }
    for module in model.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = made[id(weight)] if weight is not None else None
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer is not None else None
        if isinstance(module, torch.nn.Dropout) and params.hardware.device == "cuda":
            module.forward = _gpu_dropout(module.p)  # type: ignore[method-assign, assignment]


def _gpu_dropout(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """It keeps a byte for each element; the CPU's, which would run here, keeps a number of the input's type."""
    return lambda tensor: torch.native_dropout(tensor, share, train=True)[0]


def _bytes(weight: torch.Tensor, base: BaseModelParams, *, quantised: bool) -> int:
    """Of a frozen weight; bitsandbytes quantises the matrices of the layers."""
    if not (base.is_quantised and quantised and weight.ndim == 2):
        return weight.numel() * weight.element_size()
    return weight.numel() // (2 if base.load_in_4bit else 1) + _scale_bytes(weight, base)


def _scale_bytes(weight: torch.Tensor, base: BaseModelParams) -> int:
    if weight.ndim != 2:
        return 0
    if not base.load_in_4bit:
        return FLOAT * weight.shape[0]
    scales = weight.numel() / NF4_BLOCK
    return int(scales + FLOAT * scales / SCALE_BLOCK if base.bnb_4bit_use_double_quant else FLOAT * scales)


def _kept_bytes(model: Any, params: Params) -> int:
    """What autograd keeps of a forward pass over the longest rows, up to the loss, each piece of memory once and without the weights."""
    rows, tokens = params.hardware.per_device_train_batch_size, params.sequence.max_length
    weights = {weight.untyped_storage()._cdata for weight in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    half = params.base_model.dtype == "bfloat16"
    packed = params.sequence.packing != "none"
    shape = (1, rows * tokens) if packed else (rows, tokens)
    begins = {"cu_seq_lens_q": torch.tensor([0, shape[1]]), "max_length_q": shape[1]} if packed else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(shape, dtype=torch.long)
        # As for a layer whose inputs were trained, which all but the first are.
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        model.get_base_model().base_model(inputs_embeds=embeddings, position_ids=torch.arange(shape[1])[None], use_cache=False, **begins)
        return sum(storage.nbytes() for storage in kept.values())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32), bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def _register_attention(params: Params) -> None:
    kind = params.base_model.attn_implementation

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> tuple[torch.Tensor, None]:
        bias = None
        if kind == attention.NAME and params.sequence.packing != "none":
            attention.require_computable(module, query, value, options)
        if kind in ("sdpa", "eager"):
            # They repeat keys and values for each head, and have a mask of numbers for packed rows.
            groups = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(groups, dim=1) if groups > 1 else one for one in (key, value))
            if params.sequence.packing != "none":
                bias = query.new_empty(query.shape[0], 1, query.shape[2], query.shape[2])
        if kind == "eager":
            bias = query.new_empty(*query.shape[:3], query.shape[2], dtype=torch.float32)
        output: torch.Tensor = _Fused.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(STAND_IN, attend)
    AttentionMaskInterface.register(STAND_IN, lambda *_, **__: None)


def _flops_per_token(params: Params, model: Any, prefixes: tuple[str, ...], attended: float | None) -> float:
    """Frozen products cost 2 operations per weight forward and 2 backward, for the gradient of their input; trained ones 6.

    The loss makes the logits twice. Attention: 4 x width of all heads per token attended to, and twice that backward: half a row at most where each
    conversation is looked at alone, and under a mask of packed rows (sdpa, eager) all tokens of a pass. Activation checkpointing: the layers' forward
    pass once more.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    frozen = sum(weight.numel() for name, weight in weights.items() if not weight.requires_grad and name.startswith(prefixes))
    trained = sum(weight.numel() for weight in weights.values() if weight.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    text = model.config.get_text_config()
    masked = params.sequence.packing != "none" and params.base_model.attn_implementation in ("sdpa", "eager")
    if masked or attended is None:
        attended = params.sequence.max_length * (params.hardware.per_device_train_batch_size if masked else 0.5)
    width = int(text.num_attention_heads) * int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = 4 * attended * width * len(prefixes)
    again = (2 * (frozen + trained) + attention) if params.hardware.activation_checkpointing else 0
    return float(4 * frozen + 6 * trained + 6 * head + 3 * attention + again)
