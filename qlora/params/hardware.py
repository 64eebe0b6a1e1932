"""Section `hardware`: where it runs. These values may change the last bits of a result, so they are tracked."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class HardwareParams(Section):
    device: Literal["cpu", "cuda"]
    """Never chosen by what happens to be there."""
    num_processes: int = Field(gt=0)
    """Of a training, each with a GPU of its own; they share every update's rows. On the CPU it only serves to try that out."""
    num_threads: int = Field(gt=0)
    """Of one process on the CPU: another number can round sums differently."""
    per_device_train_batch_size: int = Field(gt=0)
    """Rows per forward pass; times num_processes it must divide train.batch_size. With packing under sdpa 1 is fastest: several share one mask."""
    activation_checkpointing: bool
    """Recomputes activations in the backward pass: far less memory for 20 to 45 % more time."""
    tf32: bool
    """Faster float32 products on a GPU, with 10 bits of mantissa."""
