"""What tests of trainings share."""

from pathlib import Path
from typing import Any

import torch

from qlora.params import Params
from qlora.training.lora import adapter_model

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


def changed(params: Params, **values: Any) -> Params:
    """The params with `section__key=value` in place."""
    update: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        update[section] = (update.get(section) or getattr(params, section)).model_copy(update={key: value})
    return params.model_copy(update=update)


def adapted(params: Params) -> Any:
    """The model that the stage trains, also where processes read it one after another and share its layers."""
    return adapter_model(changed(params, runtime__progress=False), TINY, torch.device("cpu"))
