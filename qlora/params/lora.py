"""Section `lora`: the adapter."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.params.section import Section


class LoraParams(Section):
    r: int = Field(gt=0)
    """Rank of the update. Adapter size and optimizer memory grow linearly with it."""
    lora_alpha: int = Field(gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    """all-linear: every linear layer but the output head; or names such as [q_proj, v_proj]."""
    use_rslora: bool
    """Scales the update by lora_alpha / sqrt(r): the learning rate then suits any rank. https://arxiv.org/abs/2312.03732"""
    use_dora: bool
    """Learns the length of each weight column apart from its direction; some slower. https://arxiv.org/abs/2402.09353"""
    init_lora_weights: Literal[True, "pissa", "olora"]
    """The adapter's first weights. true: A random, B zero. pissa, olora: A and B are the first r components of each weight, by SVD or by QR, and the
    frozen weight is what is left of it. Only for a float32 base model that is not quantised: what is left would be rounded once more, and the
    adapter trained on another model than the pinned one. The published adapter also holds the first A and B, subtracted: it has twice the rank.
    Meng et al. 2024, https://arxiv.org/abs/2404.02948; Buyukakyuz 2024, https://arxiv.org/abs/2406.01775"""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None
    """Layers trained in full and stored with the adapter, such as [embed_tokens, lm_head] for new tokens; null: none."""
    init_adapter: str | None
    """Folder of an adapter whose weights are where the training begins; its r, lora_alpha and kind must be these. null: from nothing."""
    init_adapter_sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its adapter_model.safetensors: what was begun with is part of the result."""

    @model_validator(mode="after")
    def _an_adapter_has_its_hash(self) -> "LoraParams":
        if (self.init_adapter is None) != (self.init_adapter_sha256 is None):
            raise ValueError("init_adapter and init_adapter_sha256 go together: `sha256sum FOLDER/adapter_model.safetensors`, or null for both")
        if self.init_adapter is not None and self.init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights!r} has no effect with init_adapter: set it to true, or init_adapter to null"
            )
        return self
