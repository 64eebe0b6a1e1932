"""The base model's frozen layers, sharded over the processes of a training (FSDP2): each holds a part and gathers a layer while it is used.

The adapter stays whole on every process, as with DDP: it is small, and so checkpoints, the published adapter and the update itself are the same.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from qlora.core.errors import InputError
from qlora.model.loading import layers_of


def shard_layers(model: PeftModel, device: torch.device, *, offload: bool) -> None:
    """Keep this process's part of each frozen layer on the device, or in the machine's memory until it is used.

    Args:
        model: Whole, in the machine's memory, with a frozen base model.

    Raises:
        InputError: the base model does not say what its layers are.
    """
    base: Any = model.get_base_model()
    layers = layers_of(base)
    if not layers:
        raise InputError(
            "base-model-layers", f"{type(base).__name__} does not say what its layers are, which hardware.strategy = 'fsdp2' shards: use 'ddp'"
        )
    adapter = {weight for weight in model.parameters() if weight.requires_grad}
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (get_world_size(),)), "ignored_params": adapter}
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    for layer in layers.values():
        fully_shard(layer, offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(), **options)
    # By itself, so that it is resharded after the forward pass.
    fully_shard(embeddings, **options)
    if head is not None and not tied:
        # Stays on the device: TRL's loss does not call it, but gathers its weights.
        fully_shard(head, **options)
    # Not the model itself: PEFT and TRL call its parts, and what is sharded is gathered where it is called.
    fully_shard(base.base_model, **options)
    if tied:
        head.weight = embeddings.weight
    for weight in adapter:
        weight.data = weight.data.to(device)
    # The Trainer then leaves the layers as they are, and keeps the adapter the same on all processes.
    base._is_distributed_loading_by_transformers = True
