"""Two real processes that share a test's work."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed
import torch.multiprocessing

START = "forkserver"
PROCESSES = multiprocessing.get_context(START)
"""New processes come from one that has imported the libraries, once for all tests, and done nothing else: an import takes seconds."""
PROCESSES.set_forkserver_preload(["qlora.prediction.test_set", "stages.train", "tests.unit.frozen"])


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in two new processes that have met over gloo; an error of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch 2.13 ships no annotation for start_processes, which has no typed equivalent.
    torch.multiprocessing.start_processes(_one, args=(port, work, arguments), nprocs=2, start_method=START)  # type: ignore[no-untyped-call]


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
