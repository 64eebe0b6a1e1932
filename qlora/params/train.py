"""Section `train`: the optimisation. Names and meanings are those of transformers.TrainingArguments where it has them."""

from typing import Literal

from pydantic import Field, model_validator

from qlora.params.section import Section


class TrainParams(Section):
    batch_size: int = Field(gt=0)
    """Rows per optimizer update, over all devices. The accumulation steps are derived and must divide exactly."""
    learning_rate: float = Field(gt=0, lt=1)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]
    warmup_steps: int = Field(ge=0)
    """Updates over which the learning rate rises from zero. `constant` has no warm-up."""
    num_train_epochs: float = Field(gt=0)
    max_steps: int | None = Field(gt=0)
    """Updates after which to stop, whatever num_train_epochs says; null: no such limit."""
    eval_strategy: Literal["no", "epoch", "steps"]
    """When the validation loss is measured; it steers nothing unless early_stopping_patience or keep says so."""
    eval_steps: int | None = Field(gt=0)
    """Updates between two measurements; only with eval_strategy: steps."""
    early_stopping_patience: int | None = Field(gt=0)
    """Measurements without a lower validation loss after which the training ends; null: it goes through."""
    keep: Literal["last", "best"]
    """Which adapter is published: that of the last update, or that of the lowest validation loss."""
    logging_steps: int = Field(gt=0)
    """Updates per point of metrics/train_loss.csv."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
    loraplus_lr_ratio: float | None = Field(ge=1)
    """LoRA+: each lora_B learns at this many times learning_rate, which all other weights keep. Try 16, with a lower learning_rate; null: one rate
    for all. Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354"""
    neftune_noise_alpha: float | None = Field(gt=0)
    """Noise on the embeddings while training, 5 to 15 as a rule; null: none. https://arxiv.org/abs/2310.05914"""
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    seed: int = Field(ge=0, lt=2**32)
    """Of the adapter's first weights, dropout and the order of rows."""
    deterministic: bool
    """Refuse kernels whose result depends on timing. Free on CPU; on a GPU it costs some speed."""

    @model_validator(mode="after")
    def _every_value_has_an_effect(self) -> "TrainParams":
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} has no effect with lr_scheduler_type = 'constant': set it to 0 or choose 'constant_with_warmup'"
            )
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise ValueError(
                f"eval_steps = {self.eval_steps} does not go with eval_strategy = '{self.eval_strategy}': a number for 'steps', null otherwise"
            )
        for name, value in (("early_stopping_patience", self.early_stopping_patience), ("keep", self.keep if self.keep == "best" else None)):
            if value is not None and self.eval_strategy == "no":
                raise ValueError(f"{name} = {value!r} needs a validation loss, but eval_strategy is 'no': choose 'epoch' or 'steps'")
        return self
