"""Section `base_model`: which weights, in which numbers, with which attention."""

from typing import Literal

from pydantic import Field, model_validator

from qlora.params.section import Section

Dtype = Literal["float32", "bfloat16"]


class BaseModelParams(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """NAME of models/base/NAME.json, written by `python -m tools.pin`."""
    dtype: Dtype
    """Of the weights that are not quantised and of the computation. bfloat16 halves memory and needs a card that has it."""
    load_in_4bit: bool
    """QLoRA: linear layers in 4 bits. An 8B base model then takes 5.7 GB in place of 16."""
    load_in_8bit: bool
    """LLM.int8(): linear layers in 8 bits. An 8B base model then takes 9 GB in place of 16, rounded less than in 4 bits; slower as a rule.
    Inputs are rounded to 8 bits too, but for the columns that hold a value above 6 in any token of the pass: what a token gives then depends a little
    on the tokens and rows beside it, and so on batch sizes. Only training on a CPU leaves inputs unrounded. Dettmers et al. 2022, https://arxiv.org/abs/2208.07339"""
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    """Quantises the scales too: saves 0.4 bits per weight."""
    bnb_4bit_compute_dtype: Dtype
    """Of the matrix products of 4-bit layers."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float32"]
    """Type that the 4-bit weights are kept as, with the same bits in each. fsdp2 asks for a floating type: that of all other weights, `dtype`."""
    attn_implementation: Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
    """Explicit, so that no installed package can change the result. sdpa and eager keep the conversations of a packed row apart by a mask of tokens
    x tokens; the others look at each conversation alone. varlen is torch's own flash kernel for packed rows, with nothing to install; answers are
    sdpa's. flash_attention_2 and 3 need the packages flash-attn and flash-attn-3 and a GPU."""

    @model_validator(mode="after")
    def _quantised_once(self) -> "BaseModelParams":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true: set one of them to false")
        return self

    @property
    def is_quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit
