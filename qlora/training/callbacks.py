"""What happens between the updates of a training: checkpoints, signals, and what a person sees."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from qlora.model.distributed import all_reduce_max
from qlora.params.runtime import RuntimeParams
from qlora.runtime.signals import Interruption

logger = logging.getLogger(__name__)
CONTINUE, SAVE, STOP = range(3)
LINE_SECONDS = 30
"""Between two lines about a training that nobody watches in a terminal."""
SMOOTHING = 0.95
"""Share of the mean so far in the next mean of the loss."""
DIVERGED = 1.5
"""A smoothed loss that is this many times its lowest has diverged."""


class SaveOrStop(TrainerCallback):
    """Decides after each update whether a checkpoint is written and whether the training ends early.

    A checkpoint at the end of an epoch waits for that epoch's validation, so that resuming from it repeats and skips nothing. After the
    last update there is none: the training is about to end by itself, and a signal then waits for that.
    """

    def __init__(self, runtime: RuntimeParams, interruption: Interruption, updates_per_epoch: int) -> None:
        self.runtime = runtime
        self.interruption = interruption
        self.updates_per_epoch = updates_per_epoch
        self.stopped = False
        """Whether a signal ended the training, after a checkpoint."""
        self._saved_at = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if state.global_step < state.max_steps and state.global_step % self.updates_per_epoch:
            self._decide(state, control, epoch_ended=False)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if self.stopped:
            # The epoch did not end, the training did: what is due at its end is not due now.
            control.should_evaluate = control.should_save = control.should_log = False
        elif state.global_step < state.max_steps and not control.should_training_stop:
            self._decide(state, control, epoch_ended=True)

    def _decide(self, state: TrainerState, control: TrainerControl, *, epoch_ended: bool) -> None:
        steps, minutes = self.runtime.save_steps, self.runtime.save_minutes
        due = epoch_ended if steps is None and minutes is None else False
        due |= steps is not None and state.global_step % steps == 0
        due |= minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        decision = all_reduce_max(STOP if self.interruption.noted else SAVE if due else CONTINUE)
        if decision != CONTINUE:
            control.should_save = True
            self._saved_at = time.monotonic()
        if decision == STOP:
            control.should_training_stop = self.stopped = True


def best_step(state: TrainerState) -> int | None:
    """The first update of the lowest validation loss; None before the first measurement."""
    measured = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
    return int(min(measured)[1]) if measured else None


class BestAdapter(TrainerCallback):
    """Knows the adapter of the lowest validation loss, and ends a training whose validation loss no longer falls.

    Args:
        weights: The trained ones by name, as they are at any moment.
        keep: Whether a copy of the best is held, on the CPU.
        patience: Measurements without a lower loss after which the training ends; None: never.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, keep: bool, patience: int | None) -> None:
        self.weights = weights
        self.keep, self.patience = keep, patience
        self.best: dict[str, torch.Tensor] = {}
        """Those of the lowest loss so far; empty before the first measurement, and without `keep`."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        best = best_step(state)
        if self.keep and best == state.global_step:
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        later = [entry for entry in state.log_history if "eval_loss" in entry and best is not None and entry["step"] > best]
        if self.patience is not None and len(later) >= self.patience:
            control.should_training_stop = True
            # A run resumed from here would train on.
            control.should_save = False

    def restore(self) -> None:
        """The best in place of the last."""
        for name, weight in self.best.items():
            self.weights[name].data.copy_(weight)


class DivergenceWarning(TrainerCallback):
    """Says once that the loss has risen far above its lowest."""

    def __init__(self) -> None:
        self._smoothed: float | None = None
        self._lowest = float("inf")
        self._warned = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not logs or "loss" not in logs:
            return
        self._smoothed = logs["loss"] if self._smoothed is None else SMOOTHING * self._smoothed + (1 - SMOOTHING) * logs["loss"]
        self._lowest = min(self._lowest, self._smoothed)
        if self._smoothed > DIVERGED * self._lowest and not self._warned:
            self._warned = True
            logger.warning(
                "the loss diverges: %.3f at step %d, it was %.3f; a lower train.learning_rate or more train.warmup_steps may help",
                self._smoothed,
                state.global_step,
                self._lowest,
            )


class LossBar(ProgressCallback):
    """One bar with the last loss in it, in place of a dict per line."""

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:  # type: ignore[override]
        shown = {name: f"{logs[name]:.4f}" for name in ("loss", "eval_loss") if logs and name in logs}
        bar: Any = self.training_bar
        if bar is not None and shown:
            bar.set_postfix(shown)


class LossLines(TrainerCallback):
    """A line now and then for logs, in which a bar would leave a line per update."""

    def __init__(self) -> None:
        self._shown_at = 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        shown = [f"{words} {logs[name]:.4f}" for name, words in (("loss", "loss"), ("eval_loss", "validation loss")) if logs and name in logs]
        now = time.monotonic()
        if shown and ("eval_loss" in logs or now - self._shown_at > LINE_SECONDS):
            self._shown_at = now
            logger.info("%s", f"step {state.global_step:,} of {state.max_steps:,}: {', '.join(shown)}")
