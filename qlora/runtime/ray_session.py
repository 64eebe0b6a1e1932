"""Ray as this project begins it: nothing about a run is sent anywhere, signals stay ours, and what is wrong is one message."""

import logging
import os
import signal
from typing import Any

from qlora.core.errors import MachineError


def import_ray(wanted_by: str, otherwise: str) -> Any:
    """The package.

    Args:
        wanted_by: The param that asks for it.
        otherwise: What to set in place of that.

    Raises:
        MachineError: it is not installed.
    """
    # Before the import, which reads them: no statistics of use; none of Ray's own lines about what died, since an error of ours says it; no warning
    # about GPUs that we don't ask for.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415 - optional, and a second long
    except ImportError as error:
        raise MachineError("ray-missing", f"{wanted_by} needs Ray ({error}): pip install -r requirements-ray.txt, or set {otherwise}") from None
    return ray


def begin(ray: Any, address: str, hint: str = "", **options: Any) -> None:
    """Connect to the cluster at the address, or begin one; in another thread than the main one, in which Ray would put its own handlers of signals.

    Raises:
        MachineError: it can't be reached or begun; the message ends with the hint.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        place = "this machine" if address == "local" else address
        raise MachineError("ray-unreachable", f"Ray at {place} can't be used: {error}{hint}") from None


def restore_sigterm() -> None:
    """In the main thread, once Ray has begun: its core has put itself before our handler, to write its call stack to the terminal."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
