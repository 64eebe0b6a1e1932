"""TRL's SFTTrainer, set up from params.yaml, made exact."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora.core.errors import InputError
from qlora.model.adapter import require_safetensors
from qlora.model.attention import packed_rows
from qlora.model.distributed import all_gather, rank_and_size
from qlora.params import Params
from qlora.params.sequence import SequenceParams
from qlora.runtime.signals import Interruption
from qlora.training.callbacks import BestAdapter, DivergenceWarning, LossBar, LossLines, SaveOrStop, best_step
from qlora.training.checkpoints import Checkpoints
from qlora.training.packing import pack
from qlora.training.preflight import LongestPass
from qlora.training.tokenization import Example

BEST = "best.safetensors"
"""In a checkpoint: the adapter of the lowest validation loss before it, where that one is kept."""
NAMED = 20
"""Conversations of a failed update that its message names."""


class ExactTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that resumes from a checkpoint as if it had never stopped, stops when a loss is not finite, and validates exactly.

    Every update's loss is logged by itself: a mean over several would be over fewer where a stop fell between them.
    """

    def __init__(
        self,
        *,
        examples: Sequence[Example],
        checkpoints: Checkpoints,
        save_or_stop: SaveOrStop,
        keep_best: bool,
        patience: int | None,
        loraplus_lr_ratio: float | None,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        args: SFTConfig,
        **options: Any,
    ) -> None:
        self.examples = examples
        self.checkpoints = checkpoints
        self.train_rows, self.eval_rows = len(train_dataset), len(eval_dataset or ())
        """Of conversations, without those that fill up the last batches of several processes."""
        self._save_or_stop = save_or_stop
        self._loraplus_lr_ratio = loraplus_lr_ratio
        # Token ids of this update's micro-batches and where their conversations begin, to name them.
        self._batches: list[dict[str, Any]] = []
        shared = args.per_device_train_batch_size * rank_and_size()[1]
        super().__init__(
            args=args,
            train_dataset=pad_to_multiple(train_dataset, shared),
            eval_dataset=pad_to_multiple(eval_dataset, shared) if eval_dataset is not None else None,
            **options,
        )
        self.add_callback(save_or_stop)
        # After the other, which decides about a checkpoint before the loss is measured.
        self.best = BestAdapter(
            {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}, keep=keep_best, patience=patience
        )
        self.add_callback(self.best)

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the training early, after a checkpoint."""
        return self._save_or_stop.stopped

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> "EpochOrder":  # noqa: ARG002
        updates = self._save_or_stop.updates_per_epoch
        return EpochOrder(self.train_rows, len(self.train_dataset), self.args.seed, lambda: self.state.global_step // updates)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._loraplus_lr_ratio is not None:
            raise_rate_of_b(optimizer, self.model, self._loraplus_lr_ratio)
        return optimizer

    def longest_inputs(self) -> dict[str, Any]:
        """Of a micro-batch of the longest rows there are."""
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-self.args.per_device_train_batch_size :]
        inputs: dict[str, Any] = self._prepare_inputs(self.data_collator([self.train_dataset[place] for place in longest]))
        return inputs

    def loss_apart(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """A loss that no average or count of the training takes in."""
        tokens: int = self._total_train_tokens  # type: ignore[has-type]
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, inputs)
        self._total_train_tokens = tokens
        self._metrics["train"].clear()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with packed_rows(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if not self.stopped:
            self.best.restore()
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        require_safetensors(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (path := Path(resume_from_checkpoint) / BEST).is_file():
            self.best.best = load_file(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        page_states(getattr(self.optimizer, "optimizer", self.optimizer))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self._batches.append({name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask") if inputs.get(name) is not None})
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises InputError when a loss or gradient is not a finite number, before a checkpoint of it can be written."""
        for name, words in (("loss", "loss"), ("grad_norm", "gradient"), ("eval_loss", "validation loss")):
            if name in logs and not math.isfinite(logs[name]):
                raise InputError("train-not-finite", self._not_finite(words, logs[name]))
        self._batches.clear()
        super().log(logs, start_time)

    def _not_finite(self, words: str, value: float) -> str:
        """Who, when, and what to try."""
        known = {tuple(example.ids): example.conversation for example in self.examples}
        own = [known[tokens] for batch in self._batches for tokens in conversations_of(batch) if tokens in known]
        # Every process sees the same loss.
        ids = dict.fromkeys(name for names in all_gather(own) for name in names)
        made_from = (
            f"The update was made from the conversations {', '.join(list(ids)[:NAMED])}: `python -m tools.inspect --id ID` shows one. " if ids else ""
        )
        return (
            f"the {words} at step {self.state.global_step} is {value}, nothing was published. {made_from}"
            "Lower train.learning_rate or train.max_grad_norm, or raise train.warmup_steps, and train again."
        )

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002
        return str(self.checkpoints.aside)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The adapter alone: the parent adds the tokenizer and a pickle that holds a hub token.
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            if output_dir and self.best.best:
                save_file(self.best.best, Path(output_dir) / BEST)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: the parent leaves one beside the checkpoints at every save, which says nothing of what this project records."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.checkpoints.saving(self.state.global_step):
            super()._save_checkpoint(model, trial)

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None) -> Any:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The first token of a row is predicted by nothing.
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        # The loss of no token is no number.
        self._eval_nats += float(result[0]) * tokens if tokens else 0.0
        self._eval_tokens += tokens
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Validation loss as nats over supervised tokens; the parent averages the means of batches of unequal size."""
        self._eval_nats, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        totals = torch.tensor([self._eval_nats, self._eval_tokens], dtype=torch.float64, device=self.accelerator.device)
        nats, tokens = self.accelerator.reduce(totals, "sum").tolist()
        output.metrics["eval_loss"] = nats / tokens
        return output

    def require_finite(self) -> None:
        """Raise InputError if an adapter weight is not finite after the last update; no loss has shown it yet."""
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters() if weight.requires_grad):
            raise InputError(
                "train-not-finite",
                f"a weight of the adapter is not a finite number after step {self.state.global_step}, nothing was published: "
                "lower train.learning_rate and train again",
            )

    def done_this_time(self) -> dict[str, int]:
        """Tokens and updates since this process began, without those before a checkpoint."""
        return {
            "tokens": int(self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen),
            "steps": self.state.global_step - self._initial_global_step,
        }

    def published_step(self) -> int:
        """The update after which the adapter was as it is published."""
        best = best_step(self.state) if self.best.keep else None
        return int(self.state.global_step) if best is None else best

    def losses(self) -> list[tuple[int, float]]:
        """(update, loss in nats a token) of every update, also of those before a stop."""
        return [(entry["step"], entry["loss"]) for entry in self.state.log_history if "loss" in entry]

    def validation_losses(self) -> list[tuple[int, float]]:
        return [(entry["step"], entry["eval_loss"]) for entry in self.state.log_history if "eval_loss" in entry]


def page_states(optimizer: Any) -> None:
    """Put the states of a paged optimizer that came from a checkpoint back into memory that can leave the GPU; torch loads them as plain tensors."""
    if not getattr(optimizer, "is_paged", False):
        return
    for weight, state in optimizer.state.items():
        for name in {"state1", "state2"} & state.keys():
            if not getattr(state[name], "is_paged", False):
                paged = optimizer.get_state_buffer(weight, dtype=state[name].dtype)
                if weight.is_cuda:
                    # It is filled with zeros by a kernel that may still run.
                    torch.cuda.synchronize(weight.device)
                state[name] = paged.copy_(state[name])


class EpochOrder(torch.utils.data.Sampler[int]):
    """Rows in an order that follows from the seed and the epoch alone, whatever was drawn before, then those that only fill up.

    Args:
        rows: How many are put in order.
        total: With those after them.
        epoch: Asked at the beginning of each.
    """

    def __init__(self, rows: int, total: int, seed: int, epoch: Callable[[], int]) -> None:
        self.rows, self.total, self.seed, self.epoch = rows, total, seed, epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, self.epoch()]).permutation(self.rows).tolist()
        yield from range(self.rows, self.total)

    def __len__(self) -> int:
        return self.total


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """Move every lora_B of a new optimizer into a group of `ratio` times the learning rate; decay and all else stay those of its group.

    LoRA+ (Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354). Not PEFT's create_loraplus_optimizer: it also raises the rate of DoRA's
    magnitudes and of biases, and keeps its own rules of weight decay.
    """
    of_b = {weight for name, weight in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        raised = [weight for weight in group["params"] if weight in of_b]
        group["params"] = [weight for weight in group["params"] if weight not in of_b]
        if raised:
            optimizer.add_param_group({**group, "params": raised, "lr": ratio * group["lr"]})


def pad_to_multiple(rows: Dataset, multiple: int) -> Dataset:
    """The rows, and after them as many without a supervised token as make a multiple: else some would be handed out twice."""
    missing = -len(rows) % multiple
    if not missing or rank_and_size()[1] == 1:
        return rows
    empty = {"input_ids": [[0, 0]] * missing, "labels": [[-100, -100]] * missing, "seq_lengths": [[2]] * missing}
    return concatenate_datasets([rows, Dataset.from_dict({name: empty[name] for name in rows.column_names}, features=rows.features)])


def smoothed(losses: Sequence[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """The mean of each `width` updates, at the last of them.

    >>> smoothed([(1, 3.0), (2, 1.0), (3, 4.0)], 2)
    [(2, 2.0), (3, 4.0)]
    """
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [(group[-1][0], math.fsum(loss for _, loss in group) / len(group)) for group in groups]


def conversations_of(batch: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """Token ids of each conversation of a micro-batch, which lie end to end in its rows, or padded one a row."""
    for place, row in enumerate(batch["input_ids"].tolist()):
        if "position_ids" in batch:
            begins = [index for index, position in enumerate(batch["position_ids"][place].tolist()) if position == 0]
            yield from (tuple(row[begin:end]) for begin, end in zip(begins, [*begins[1:], len(row)], strict=True))
        else:
            yield tuple(token for token, seen in zip(row, batch["attention_mask"][place].tolist(), strict=True) if seen)


def training_arguments(params: Params, folder: Path) -> SFTConfig:
    """Every value that params.yaml decides, and the defaults of TRL that would decide for it switched off."""
    hardware, sequence, runtime = params.hardware, params.sequence, params.runtime
    cuda = hardware.device == "cuda"
    if runtime.report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent.parent / "tensorboard" / folder.name)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=hardware.per_device_train_batch_size,
        per_device_eval_batch_size=hardware.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        **_optimisation(params),
        # By SaveOrStop.
        save_strategy="no",
        logging_steps=1,
        # NaN must be seen, not logged as 0.
        logging_nan_inf_filter=False,
        bf16=params.base_model.dtype == "bfloat16",
        tf32=hardware.tf32 if cuda else None,
        use_cpu=not cuda,
        torch_compile=hardware.torch_compile,
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
        ddp_find_unused_parameters=False,
    )
    # Several visible GPUs would multiply the rows of a step and wrap the model in DataParallel: a process uses one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _optimisation(params: Params) -> dict[str, Any]:
    """Section `train` in the names of TrainingArguments."""
    train = params.train
    return {
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "eval_strategy": train.eval_strategy,
        "eval_steps": train.eval_steps,
        "optim": train.optim,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "data_seed": train.seed,
    }


def make_trainer(
    params: Params,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    validation: Sequence[Example],
    checkpoints: Checkpoints,
    interruption: Interruption,
) -> ExactTrainer:
    """A trainer for an adapter model, its adapter in float32."""
    rows = rows_of(train, params.sequence)
    # TRL rounds the adapter of a quantised model to bfloat16: that of lora.init_adapter would start as another one.
    weights = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = ExactTrainer(
        examples=train,
        checkpoints=checkpoints,
        save_or_stop=SaveOrStop(params.runtime, interruption, math.ceil(len(rows) / params.train.batch_size)),
        keep_best=params.train.keep == "best",
        patience=params.train.early_stopping_patience,
        loraplus_lr_ratio=params.train.loraplus_lr_ratio,
        model=model,
        args=training_arguments(params, checkpoints.folder),
        train_dataset=rows,
        eval_dataset=rows_of(validation, params.sequence) if params.train.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[DivergenceWarning()],
    )
    trainer.add_callback(LongestPass(trainer.longest_inputs, trainer.loss_apart))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if params.runtime.progress:
        trainer.add_callback(LossBar() if sys.stderr.isatty() else LossLines())
    for name, weight in model.named_parameters():
        if name in weights:
            weight.data = weights[name].float()
    if rank := rank_and_size()[0]:
        # Other dropout than the first process's.
        torch.manual_seed(params.train.seed + rank)
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
