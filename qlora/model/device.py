"""Device, threads and determinism, set once per process before any model is made."""

import operator
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qlora.core.errors import InputError, MachineError
from qlora.model import distributed
from qlora.params.hardware import HardwareParams
from qlora.runtime.gpus import require_gpu


def set_up_device(hardware: HardwareParams, *, deterministic: bool, processes: int = 1) -> torch.device:
    """The device to use, with threads and number formats set as the params say, once all processes have met.

    Args:
        hardware: What was asked for.
        deterministic: Refuse kernels whose result depends on timing.
        processes: How many share the work.

    Raises:
        MachineError: `device: cuda` without a usable GPU.
        InputError: another number of processes was launched.
    """
    torch.set_num_threads(hardware.num_threads)
    # Else accelerate chooses a number of its own for several processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(hardware.num_threads))
    if deterministic:
        # Read by cuBLAS when its first handle is made: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Flash attention's backward pass has an exact variant, off by default.
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid that comes with it: writing NaN into every new tensor made a step on the CPU 40 % slower.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    require_gpu(hardware)
    if hardware.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = hardware.tf32
        torch.backends.cudnn.allow_tf32 = hardware.tf32
    distributed.join(hardware.device)
    if (launched := distributed.rank_and_size()[1]) != processes:
        raise InputError("processes-differ", f"{launched} process(es) were launched, hardware.num_processes asks for {processes}: run `dvc repro`")
    return torch.device("cuda", torch.cuda.current_device()) if hardware.device == "cuda" else torch.device("cpu")


def require_compiler(hardware: HardwareParams) -> None:
    """Raises MachineError when Triton could not compile its launcher: TRL's loss needs it at the first update, after the whole baseline."""
    if hardware.device == "cpu" or find_spec("triton") is None:
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        raise MachineError(
            "compiler-missing", f"the training's loss is compiled here, but there is no C compiler ({compiler or 'gcc'}): `apt-get install gcc`"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        version = sysconfig.get_python_version()
        raise MachineError(
            "compiler-missing", f"the training's loss is compiled here, but {header} is missing: `apt-get install python{version}-dev`"
        )


TRAINING_SETTINGS = ("hardware.per_device_train_batch_size", "hardware.activation_checkpointing", "sequence.max_length")
PREDICTION_SETTINGS = ("base_model.load_in_4bit", "base_model.dtype", "base_model.attn_implementation")
"""What saves most memory, the most first. For a batch of answers that does not fit, qlora/prediction/generation.py names a smaller one."""


def out_of_memory(error: BaseException) -> str | None:
    """The first line of an error that says that no memory is left; None for any other error."""
    # The CPU's allocator has no class of its own.
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    return str(error).splitlines()[0].rstrip(".") if str(error) else "no memory is left"


@contextmanager
def translate_out_of_memory(settings: Sequence[str], params: Any) -> Iterator[None]:
    """Raises MachineError with the settings that save most, and their values, in place of torch's own error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not (reason := out_of_memory(error)):
            raise
        values = ", ".join(f"{name} (now {operator.attrgetter(name)(params)!r})" for name in settings)
        raise MachineError("out-of-memory", f"{reason}. What saves most: {values}.") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU on cuda, of the process on cpu."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # noqa: PLC0415 - not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
