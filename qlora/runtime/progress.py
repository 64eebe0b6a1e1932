"""Progress bars for whatever lasts over a second."""

from typing import Any


def bar(description: str, *, total: int | None = None, unit: str, enabled: bool) -> Any:
    """A tqdm bar, as a context manager with `update(n)`; shown in a terminal alone, and only when `enabled` (runtime.progress)."""
    from tqdm import tqdm  # noqa: PLC0415 - a tenth of a second that a tool's --help need not take

    return tqdm(total=total, desc=description, unit=f" {unit}", delay=1, disable=None if enabled else True)
