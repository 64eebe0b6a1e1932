"""The attention implementation `varlen`: torch's own variable-length flash attention for packed rows, with nothing to install.

TRL's collator lays the conversations of a pass end to end and says where each begins (`cu_seq_lens_q`). The kernel
(torch.nn.attention.varlen) looks at each of them alone: no mask of tokens x tokens, no copies of keys and values for the
heads that share them, and bytes that don't depend on timing in deterministic mode. It runs on GPUs; on a CPU a loop over
the conversations takes its place. Calls without `cu_seq_lens_q` (answers, likelihoods, padded rows) are `sdpa`'s.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.core.errors import MachineError

NAME = "varlen"


@dataclass(slots=True)
class _Pass:
    """What is known of the pass under way."""

    packed: bool = False
    """It says where its conversations begin, so no mask is made for it."""
    longest: int = 0
    """Tokens of its longest conversation."""
    window: int | None = None
    """A sliding window that a mask was asked for with."""
    window_reached_layers: bool = False

    def begin(self, *, packed: bool) -> None:
        self.packed, self.longest, self.window, self.window_reached_layers = packed, 0, None, False


_pass = _Pass()

# Shape suffixes: B batch, T tokens of a pass, H query heads, G key and value heads, D width of a head.


@contextmanager
def packed_rows(inputs: dict[str, Any]) -> Iterator[None]:
    """While a model is called with these inputs `varlen` makes no mask, if they say where each conversation begins.

    Raises:
        MachineError: a sliding window is in the masks alone, which were not made.
    """
    _pass.begin(packed=inputs.get("cu_seq_lens_q") is not None)
    try:
        yield
    finally:
        _pass.packed = False
    if _pass.window and _pass.window < _pass.longest and not _pass.window_reached_layers:
        raise MachineError(
            "attention-missing", _refusal(f"the model does not tell its layers of its sliding window of {_pass.window} tokens", "sdpa")
        )


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: (B, H, T, D)
        key: (B, G, T, D)
        value: (B, G, T, D)
        options: transformers' names. `cu_seq_lens_q` holds where each conversation begins and the last one ends, `max_length_q` the tokens of
            the longest; without them it is sdpa's attention with its mask.

    Returns:
        The outputs, (B, T, H, D), and no attention weights.

    Raises:
        MachineError: the layer asks for what the kernel doesn't compute, or the model doesn't tell its attention where conversations begin.
    """
    begins: Any = options.get("cu_seq_lens_q")
    if begins is None and not _pass.packed:
        _refuse_uncomputable(module, options)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    require_computable(module, query, value, options)
    query_THD, key_TGD, value_TGD = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    scale, window = options.get("scaling"), options.get("sliding_window")
    _pass.longest = max(_pass.longest, int(options["max_length_q"]))
    _pass.window_reached_layers |= bool(window)
    if query_THD.device.type == "cuda":
        longest = int(options["max_length_q"])
        left = window - 1 if window and window < longest else -1
        output_THD: Any = varlen_attn(
            query_THD, key_TGD, value_TGD, begins, begins, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True
        )
    else:
        output_THD = attend_apart(query_THD, key_TGD, value_TGD, begins.tolist(), scale=scale, window=window)
    return output_THD.unflatten(0, (query.shape[0], query.shape[2])), None


def attend_apart(query: Tensor, key: Tensor, value: Tensor, begins: list[int], *, scale: float | None, window: int | None) -> Tensor:
    """What the kernel computes, one conversation after another: causal attention, within the last `window` tokens where there is one.

    Args:
        query: (T, H, D)
        key: (T, G, D)
        value: (T, G, D)
        begins: Where each conversation begins, and T.

    Returns:
        (T, H, D)
    """
    outputs = []
    for begin, end in itertools.pairwise(begins):
        query_HTD, key_GTD, value_GTD = (tensor[begin:end].transpose(0, 1) for tensor in (query, key, value))
        seen = None
        if window and window < end - begin:
            places = torch.arange(end - begin, device=query.device)
            back = places[:, None] - places
            seen = (back >= 0) & (back < window)
        output_BHTD = F.scaled_dot_product_attention(
            query_HTD[None], key_GTD[None], value_GTD[None], attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
        )
        outputs.append(output_BHTD[0].transpose(0, 1))
    return torch.cat(outputs)


def require_computable(module: torch.nn.Module, query: Tensor, value: Tensor, options: dict[str, Any]) -> None:
    """Raises MachineError where a layer asks for what the kernel doesn't compute, or isn't told where the conversations of a row begin."""
    _refuse_uncomputable(module, options)
    if options.get("dropout"):
        reason = "drops attention weights (attention_dropout), which the kernel does not compute"
    elif query.shape[-1] != value.shape[-1]:
        reason = "has heads of two widths, which the kernel does not compute"
    elif options.get("cu_seq_lens_q") is None:
        reason = "is not told where the conversations of a row begin"
    else:
        return
    raise MachineError("attention-missing", _refusal(f"{type(module).__name__} {reason}", "sdpa"))


def _refuse_uncomputable(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Raises MachineError for what neither the kernel nor sdpa computes; sdpa would leave out some of it without a word."""
    for name, words in (("softcap", "caps its attention scores"), ("s_aux", "has attention sinks")):
        if options.get(name) is not None:
            raise MachineError("attention-missing", _refusal(f"{type(module).__name__} {words} ({name}), which it does not compute", "eager"))


def refuse_model(config: PretrainedConfig) -> None:
    """Raises MachineError when models of this config can't use `varlen`; what single layers ask for is refused at their first call."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    name = model_class.__name__
    if not model_class._supports_sdpa:
        raise MachineError("attention-missing", _refusal(f"{name} takes no sdpa, which computes its answers", "eager"))
    if not model_class._supports_flash_attn:
        raise MachineError("attention-missing", _refusal(f"{name} takes no flash kernels", "sdpa"))
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise MachineError("attention-missing", _refusal(f"{name} attends in chunks, which the kernel does not compute", "sdpa"))


def _refusal(reason: str, instead: str) -> str:
    return f"base_model.attn_implementation = {NAME!r}: {reason}: set it to {instead!r}"


def _mask(**arguments: Any) -> Tensor | None:
    if not _pass.packed:
        return sdpa_mask(**arguments)
    _pass.window = arguments.get("local_size") or _pass.window
    return None


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, _mask)
