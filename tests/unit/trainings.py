"""What tests of trainings share."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import set_seed

from qlora import base_model, sharding
from qlora.new_adapter import lora_config
from qlora.params import Params

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


def changed(params: Params, **values: Any) -> Params:
    """The params with `section__key=value` in place."""
    update: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        update[section] = (update.get(section) or getattr(params, section)).model_copy(update={key: value})
    return params.model_copy(update=update)


def adapted(params: Params) -> Any:
    cpu = torch.device("cpu")
    base = base_model.load_model(params.base_model, TINY, cpu, progress=False)
    set_seed(params.train.seed)
    model = get_peft_model(base, lora_config(params.lora, base))
    if params.hardware.strategy == "fsdp2":
        sharding.share_layers(model, cpu, offload=params.hardware.offload_params)
    return model
