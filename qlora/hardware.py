"""Device, threads and determinism, set once per process before any model is made."""

import os

import torch

from qlora.errors import MachineError
from qlora.params.hardware import HardwareParams


def set_up(hardware: HardwareParams, *, deterministic: bool) -> torch.device:
    """The device to use, with threads and number formats set as the params say.

    Args:
        hardware: What was asked for.
        deterministic: Refuse kernels whose result depends on timing.

    Raises:
        MachineError: `device: cuda` without a usable GPU.
    """
    torch.set_num_threads(hardware.num_threads)
    if deterministic:
        # Read by cuBLAS when its first handle is made: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Flash attention's backward pass has an exact variant, off by default.
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid that comes with it: writing NaN into every new tensor made a step on the CPU 40 % slower.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if hardware.device == "cuda":
        if not torch.cuda.is_available():
            raise MachineError(
                "no-gpu",
                "hardware.device = 'cuda', but torch sees no GPU here: run on a machine with one, "
                "or use a recipe for CPUs (`python -m tools.recipes use tiny-cpu`)",
            )
        torch.backends.cuda.matmul.allow_tf32 = hardware.tf32
        torch.backends.cudnn.allow_tf32 = hardware.tf32
    return torch.device(hardware.device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU on cuda, of the process on cpu."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # noqa: PLC0415 - not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
