"""What tests of trainings share."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora.params import Params
from qlora.runtime.signals import Interruption
from qlora.training.checkpoints import Checkpoints
from qlora.training.lora import adapter_model
from qlora.training.tokenization import Example
from qlora.training.trainer import make_trainer

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


def changed(params: Params, **values: Any) -> Params:
    """The params with `section__key=value` in place."""
    update: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        update[section] = (update.get(section) or getattr(params, section)).model_copy(update={key: value})
    return params.model_copy(update=update)


def adapted(params: Params) -> Any:
    """The model that the stage trains, also where processes read it one after another and shard its layers."""
    return adapter_model(changed(params, runtime__progress=False), TINY, torch.device("cpu"))


class SignalAt(TrainerCallback):
    """As if a signal came during one update, or during the validation after it."""

    def __init__(self, interruption: Interruption, step: int, *, validating: bool = False) -> None:
        self.interruption, self.step, self.validating = interruption, step, validating

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step and not self.validating:
            self.interruption.noted = "SIGTERM"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.validating:
            self.interruption.noted = "SIGTERM"


def run(params: Params, examples: list[Example], tokenizer: Any, folder: Path, stop: int | None = None, *, validating: bool = False) -> Any:
    """The trainer after one run, from the newest checkpoint if there is one."""
    interruption = Interruption()
    with Checkpoints(folder) as checkpoints:
        trainer = make_trainer(params, adapted(params), tokenizer, examples, examples[:7], checkpoints, interruption)
        if stop:
            trainer.add_callback(SignalAt(interruption, stop, validating=validating))
        resumed = checkpoints.newest()
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return trainer


def results(trainer: Any) -> tuple[dict[str, torch.Tensor], Any, Any]:
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return weights, trainer.losses(), trainer.validation_losses()


def assert_same(trainer: Any, expected: Any) -> None:
    weights, losses, validation = results(trainer)
    assert weights.keys() == expected[0].keys()
    assert all(torch.equal(weights[name], expected[0][name]) for name in weights)
    assert losses == expected[1]
    assert validation == expected[2]
