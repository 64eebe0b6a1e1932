"""The attention implementation `varlen`: torch's own variable-length flash attention for packed rows, with nothing to install.

TRL's collator lays the conversations of a pass end to end and says where each begins (`cu_seq_lens_q`). The kernel
(torch.nn.attention.varlen) looks at each of them alone: no mask of tokens x tokens, no copies of keys and values for the
heads that share them, and bytes that don't depend on timing in deterministic mode. It runs on GPUs; on a CPU a loop over
the conversations takes its place. Calls without `cu_seq_lens_q` (answers, likelihoods, padded rows) are `sdpa`'s.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.core.errors import MachineError

NAME = "varlen"
_rows = {"packed": False}
"""Whether the pass under way says where its conversations begin, so that no mask is to be made for it."""

# Shape suffixes: B batch, T tokens of a pass, H query heads, G key and value heads, D width of a head.


@contextmanager
def packed_rows(inputs: dict[str, Any]) -> Iterator[None]:
    """While a model is called with these inputs `varlen` makes no mask, if they say where each conversation begins."""
    _rows["packed"] = inputs.get("cu_seq_lens_q") is not None
    try:
        yield
    finally:
        _rows["packed"] = False


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
    begins = options.get("cu_seq_lens_q")
    if begins is None:
        if _rows["packed"]:
            require_computable(module, query, value, options)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    require_computable(module, query, value, options)
    query_THD, key_TGD, value_TGD = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    scale, window = options.get("scaling"), options.get("sliding_window")
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
    if options.get("softcap") is not None:
        reason = "caps its attention scores (softcap)"
    elif options.get("s_aux") is not None:
        reason = "has attention sinks (s_aux)"
    elif options.get("dropout"):
        reason = "drops attention weights (attention_dropout)"
    elif query.shape[-1] != value.shape[-1]:
        reason = "has heads of two widths"
    elif options.get("cu_seq_lens_q") is None:
        raise MachineError("attention-missing", _refusal(f"{type(module).__name__} is not told where the conversations of a row begin"))
    else:
        return
    raise MachineError("attention-missing", _refusal(f"{type(module).__name__} {reason}, which the kernel does not compute"))


def refuse_model(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Raises MachineError when models of this class can't be trained with `varlen`; what single layers ask for is refused at their first call."""
    text = config.get_text_config()
    if not model_class._supports_flash_attn:
        raise MachineError("attention-missing", _refusal(f"{model_class.__name__} takes no flash kernels"))
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise MachineError(
            "attention-missing", _refusal(f"{model_class.__name__} attends in chunks (layer_types), which the kernel does not compute")
        )


def _refusal(reason: str) -> str:
    return f"base_model.attn_implementation = {NAME!r}: {reason}: set it to 'sdpa', or to 'eager' if the model takes no 'sdpa'"


def _mask(**arguments: Any) -> Tensor | None:
    return None if _rows["packed"] else sdpa_mask(**arguments)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, _mask)
