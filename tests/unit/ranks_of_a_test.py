"""Two real processes that share a test's work."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed
import torch.multiprocessing


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in two new processes that have met over gloo; an error of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch gives this function no types.
    torch.multiprocessing.spawn(_one, args=(port, work, arguments), nprocs=2)  # type: ignore[no-untyped-call]


def _one(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
