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
from qlora.runtime.signals import handle_early_signals


def main() -> None:
    action, acting = sys.argv[1], int(sys.argv[2])
    if action == "see":
        # Its launcher's end would end it too; and both streams of another one than the first are kept back.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(sys.argv[3], os.environ["RANK"]).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""), encoding="utf-8")
        time.sleep(float(sys.argv[4]))
        return
    if action == "stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(StoppedError.exit_code))
        print("ready", flush=True)
        time.sleep(60)
    if action in ("early", "hang") and int(os.environ["RANK"]) == acting:
        raise MachineError("disk-full", f"no room for rank {acting}")
    if action == "hang":
        time.sleep(300)
    take_part(action, acting)


def take_part(action: str, acting: int) -> None:
    # Two seconds, which the actions above need not take.
    import torch
    import torch.distributed as dist

    from qlora.model import distributed

    with distributed.process_group():
        distributed.join("cpu")
        # One that ends while another still connects to it makes gloo print lines of its own.
        dist.barrier()
        act(action, acting)
        rank, size = distributed.rank_and_size()
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        print(f"rank {rank} of {size}: {int(total)}", flush=True)


def act(action: str, acting: int) -> None:
    rank = int(os.environ["RANK"])
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


if __name__ == "__main__":
    # As stages/__init__.py does.
    handle_early_signals()
    command.run(main)
