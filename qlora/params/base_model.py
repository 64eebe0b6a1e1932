"""Section `base_model`: which weights, in which numbers, with which attention."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section

Dtype = Literal["float32", "bfloat16"]


class BaseModelParams(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """NAME of models/base/NAME.json, written by `python -m tools.pin`."""
    dtype: Dtype
    """Of the weights that are not quantised and of the computation. bfloat16 halves memory and needs a card that has it."""
    load_in_4bit: bool
    """QLoRA: linear layers in 4 bits. An 8B base model then takes 5.7 GB in place of 16."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    """Quantises the scales too: saves 0.4 bits per weight."""
    bnb_4bit_compute_dtype: Dtype
    """Of the matrix products of 4-bit layers."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    """Explicit, so that no installed package can change the result. flash_attention_2 needs the package flash-attn and a GPU."""
