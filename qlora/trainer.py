"""TRL's SFTTrainer, set up from params.yaml, with a validation loss that is exact."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora.checkpoints import MarkComplete
from qlora.encoding import Example
from qlora.packing import pack
from qlora.params import Params
from qlora.params.lora import LoraParams
from qlora.params.sequence import SequenceParams


class ExactEvalTrainer(SFTTrainer):  # type: ignore[misc]
    """Validation loss as nats over supervised tokens; the parent averages the means of batches of unequal size."""

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None) -> Any:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The first token of a row is predicted by nothing.
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        self._eval_nats += float(result[0]) * tokens
        self._eval_tokens += tokens
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_nats, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        totals = torch.tensor([self._eval_nats, self._eval_tokens], dtype=torch.float64, device=self.accelerator.device)
        nats, tokens = self.accelerator.reduce(totals, "sum").tolist()
        output.metrics["eval_loss"] = nats / tokens
        return output


class LossBar(ProgressCallback):
    """One bar with the last loss in it, in place of a dict per line."""

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:  # type: ignore[override]
        shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if logs and name in logs}
        bar: Any = self.training_bar
        if bar is not None and shown:
            bar.set_postfix(shown)


def lora_config(params: LoraParams) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.target_modules,
        bias="none",
    )


def training_arguments(params: Params, checkpoints: Path) -> SFTConfig:
    """Every value that params.yaml decides, and the defaults of TRL that would decide for it switched off."""
    train, hardware, sequence, runtime = params.train, params.hardware, params.sequence, params.runtime
    cuda = hardware.device == "cuda"
    if runtime.report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints.parent.parent / "tensorboard" / checkpoints.name)
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=hardware.per_device_train_batch_size,
        per_device_eval_batch_size=hardware.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        eval_strategy=train.eval_strategy,
        eval_steps=train.eval_steps,
        save_strategy="steps" if runtime.save_steps else "epoch",
        save_steps=runtime.save_steps or 500,
        save_total_limit=2,
        logging_steps=train.logging_steps,
        # NaN must be seen, not logged as 0.
        logging_nan_inf_filter=False,
        optim=train.optim,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        data_seed=train.seed,
        bf16=params.base_model.dtype == "bfloat16",
        tf32=hardware.tf32 if cuda else None,
        use_cpu=not cuda,
        activation_checkpointing=hardware.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if hardware.activation_checkpointing else None,
        max_length=sequence.max_length,
        # The rows are packed already: TRL's depend on the number of processes. With this the collator starts positions anew at each
        # conversation of a row and gives no attention mask, by which every attention implementation keeps them apart.
        packing=sequence.packing != "none",
        packing_strategy="bfd",
        dataset_kwargs={"skip_prepare_dataset": True},
        # The rows are token ids in memory: collating them takes no time worth a process.
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        report_to=runtime.report_to,
        disable_tqdm=not runtime.progress,
        include_num_input_tokens_seen="all",
        auto_find_batch_size=False,
    )
    # Several visible GPUs would multiply the rows of a step and wrap the model in DataParallel: a process uses one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_trainer(
    params: Params,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    validation: Sequence[Example],
    checkpoints: Path,
) -> ExactEvalTrainer:
    """A trainer for an adapter model, its adapter in float32."""
    callbacks: list[TrainerCallback] = [MarkComplete()]
    trainer = ExactEvalTrainer(
        model=model,
        args=training_arguments(params, checkpoints),
        train_dataset=rows_of(train, params.sequence),
        eval_dataset=rows_of(validation, params.sequence) if params.train.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if params.runtime.progress:
        trainer.add_callback(LossBar())
    # TRL casts the adapter of a quantised model to bfloat16, which a resumed run would load as float32: not the same run.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def rows_of(examples: Sequence[Example], sequence: SequenceParams) -> Dataset:
    """The rows that are trained on: input_ids and labels of one example, or of several and their seq_lengths."""
    if sequence.packing == "none":
        return Dataset.from_dict({"input_ids": [example.ids for example in examples], "labels": [example.labels for example in examples]})
    packed = [[examples[place] for place in places] for places in pack([len(example.ids) for example in examples], sequence.max_length)]
    return Dataset.from_dict(
        {
            "input_ids": [[token for example in row for token in example.ids] for row in packed],
            "labels": [[label for example in row for label in example.labels] for row in packed],
            "seq_lengths": [[len(example.ids) for example in row] for row in packed],
        }
    )
