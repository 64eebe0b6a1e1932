"""The machine and versions behind a benchmark's numbers."""

import os
import platform
from importlib import metadata
from pathlib import Path


def describe_machine() -> dict[str, object]:
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    versions = {name: metadata.version(name) for name in ("pyarrow", "datasets", "torch", "transformers")}
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
