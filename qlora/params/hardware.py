"""Section `hardware`: where it runs. These values may change the last bits of a result, so they are tracked."""

from typing import Literal

from pydantic import Field, model_validator

from qlora.params.section import Section


class HardwareParams(Section):
    device: Literal["cpu", "cuda"]
    """Never chosen by what happens to be there."""
    num_processes: int = Field(gt=0)
    """Of a stage, on all machines together, each with a GPU of its own; they share every update's rows. On the CPU it only serves to try that out."""
    num_machines: int = Field(gt=0)
    """Machines with as many of the processes each. Above 1 they are those of a Ray cluster that exists already; see docs/cluster.md."""
    strategy: Literal["ddp", "fsdp2"]
    """Of several processes of a training. ddp: each holds the whole base model. fsdp2: its layers are sharded, for one that no card holds."""
    offload_params: bool
    """fsdp2 alone: layers wait in the machine's memory until they are used. Slow; for cards that hold not even their share."""
    num_threads: int = Field(gt=0)
    """Of one process on the CPU: another number can round sums differently."""
    per_device_train_batch_size: int = Field(gt=0)
    """Rows per forward pass; times num_processes it must divide train.batch_size. With packing under sdpa 1 is fastest: several share one mask."""
    activation_checkpointing: bool
    """Recomputes activations in the backward pass: far less memory for 20 to 45 % more time."""
    torch_compile: bool
    """Of the training's model: fewer, larger kernels after a minute or more of compiling. Another order of sums, so other last bits."""
    tf32: bool
    """Faster float32 products on a GPU, with 10 bits of mantissa."""

    @model_validator(mode="after")
    def _processes_fit_machines(self) -> "HardwareParams":
        if self.num_processes % self.num_machines:
            raise ValueError(f"num_processes = {self.num_processes} is not a multiple of num_machines = {self.num_machines}: each has as many")
        return self

    @model_validator(mode="after")
    def _strategy_has_an_effect(self) -> "HardwareParams":
        if self.strategy == "fsdp2":
            if self.device == "cpu":
                raise ValueError("strategy = 'fsdp2' needs GPUs, but device = 'cpu': choose 'ddp'")
            if self.num_processes == 1:
                raise ValueError("strategy = 'fsdp2' shards layers over processes, but num_processes = 1: choose 'ddp', or more processes")
        elif self.offload_params:
            raise ValueError("offload_params = true has no effect with strategy = 'ddp': set it to false or choose 'fsdp2'")
        return self

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.num_machines

    @property
    def prediction_processes(self) -> int:
        """Processes of baseline and predict. A model too large for one card answers from one process with its layers split over the cards:
        gathering layers for every token would take longer."""
        return 1 if self.strategy == "fsdp2" else self.num_processes

    @property
    def device_map(self) -> Literal["balanced"] | None:
        """How a model that answers is placed: "balanced" splits its layers over all cards; None puts it on one device."""
        return "balanced" if self.strategy == "fsdp2" else None
