"""A program of several ranks for test_launcher.py: `python -m tests.unit.rank_program ACTION RANK`.

The action is that rank's, or each one's for -1; the others wait for it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from qlora.core.errors import InputError, MachineError, StoppedError
from qlora.runtime import command


def main() -> None:
    action, acting = sys.argv[1], int(sys.argv[2])
    if action == "see":
        # Both streams of another one than the first are kept back.
        Path(sys.argv[3], os.environ["RANK"]).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""), encoding="utf-8")
        time.sleep(float(sys.argv[4]))
        return
    if action == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(StoppedError.exit_code))
        print("ready", flush=True)
        time.sleep(60)
    if action in ("early", "hang") and int(os.environ["RANK"]) == acting:
        raise MachineError("disk-full", f"no room for rank {acting}")
    if action == "hang":
        time.sleep(300)
    # Those that never meet need no torch, which takes a second and a half of a core.
    from qlora.model import distributed

    with distributed.process_group():
        take_part(action, acting)


def take_part(action: str, acting: int) -> None:
    import torch
    import torch.distributed as dist

    from qlora.model import distributed

    distributed.join("cpu")
    rank, size = distributed.rank_and_size()
    if rank == acting or acting < 0:
        if action == "refuse":
            raise InputError("data-empty", f"the value of rank {rank}")
        if action == "fail":
            raise MachineError("disk-full", f"no room for rank {rank}")
        if action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "break":
            raise RuntimeError("a bug")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    print(f"rank {rank} of {size}: {int(total)}", flush=True)


if __name__ == "__main__":
    command.run(main)
