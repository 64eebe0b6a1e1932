"""What made a stage's outputs besides its inputs: Python, packages, processor, device, threads and switches of exactness.

Written to environment.json beside the metrics, an output of no stage and not in Git: the same inputs on another machine must not look like
other inputs. It holds nothing that differs between two runs on one machine. `tools.card` freezes a copy in reports/.
"""

import hashlib
import os
import platform
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.core.environment import pinned_packages
from qlora.core.files import update_json

if TYPE_CHECKING:
    import torch


FILE = "environment.json"


def record_environment(notes: Path, stage: str, device: "torch.device | None" = None) -> None:
    """Write this process's environment under the stage's name to environment.json in the folder; entries of other stages stay.

    Args:
        device: Where the stage's model ran; None for a stage without one.
    """
    update_json(notes / FILE, stage, describe(device))


def describe(device: "torch.device | None" = None, requirements: Path = Path("requirements.txt")) -> dict[str, Any]:
    """This process's environment, in values that are equal on the same kind of machine.

    Args:
        requirements: The file whose packages count.
    """
    installed = sorted(f"{name}=={version}" for name, _, version in pinned_packages(requirements))
    described = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "cpu": _cpu(),
        "packages": {"count": len(installed), "sha256": hashlib.sha256("\n".join(installed).encode()).hexdigest()},
    }
    return described | _of_torch(device) if device else described


def _cpu() -> str:
    """The processor's name, or what the system has in place of one."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor()


def _of_torch(device: "torch.device") -> dict[str, Any]:
    import torch  # noqa: PLC0415 - seconds that a stage without a model need not pay

    return {
        "torch": torch.__version__,
        # As torch sees it: ATEN_CPU_CAPABILITY can hide a part.
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": _gpu(device) if device.type == "cuda" else "cpu",
        # No package of requirements.txt, and a kernel that attention may run on.
        **{name: version(name) for name in ("flash-attn", "flash-attn-3") if find_spec(name.replace("-", "_"))},
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            **{name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC", "ATEN_CPU_CAPABILITY")},
        },
    }


def _gpu(device: "torch.device") -> dict[str, Any]:
    import torch  # noqa: PLC0415

    return {
        "name": torch.cuda.get_device_name(device),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver, where the system tells it."""
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None
